"""Architectures as data: where the parts of a transformer are. Methods ask for roles, never for a model type.

To support another model type, add a row to ``rows.py``, and its config to ``tests/unit/anatomy/``, which
checks every role of every row on a tiny model.
"""

from compress.anatomy.linears import set_weight, weight
from compress.anatomy.lookup import (
    LayerShape,
    Sizes,
    anatomy_of,
    base_class,
    layer_shapes,
    model_class,
    projection_rows,
    sizes_of,
    task_of,
    without_layers,
)
from compress.anatomy.roles import Anatomy, Task, linears_by_input
from compress.anatomy.rows import ROWS

__all__ = [
    "ROWS",
    "Anatomy",
    "LayerShape",
    "Sizes",
    "Task",
    "anatomy_of",
    "base_class",
    "layer_shapes",
    "linears_by_input",
    "model_class",
    "projection_rows",
    "set_weight",
    "sizes_of",
    "task_of",
    "weight",
    "without_layers",
]
