"""Taking whole layers out of a model: what every depth-pruning method shares."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from compress.anatomy import Anatomy, without_layers
from compress.checkpoint import Draft
from compress.errors import BadInput
from compress.modeling import config_of
from compress.plan import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def plan_without_layers(shape: ModelShape, removed: Collection[int]) -> ModelShape:
    """The shape of the model when the layers ``removed`` are gone and the others are numbered anew."""
    config = without_layers(shape.pretrained_config, removed)
    renamed = _renamed(shape.tensors, shape.anatomy, shape.num_layers, removed)
    return ModelShape(
        _written(shape.config, config),
        {new: shape.tensors[old] for new, old in renamed.items()},
        shape.folder,
    )


def remove_layers(draft: Draft, removed: Collection[int]) -> None:
    """Take the layers ``removed`` out of a draft that is equal to its parent; tensors stay in the parent's files.

    Raises:
        BadInput: the draft is quantized (packed tensors may not be moved).
    """
    if "quantization_config" in draft.config:
        raise BadInput("The model is quantized already; prune first, then quantize.")
    shape = ModelShape.of(draft.parent)
    config = without_layers(shape.pretrained_config, removed)
    renamed = _renamed(draft.parent.tensors, shape.anatomy, shape.num_layers, removed)
    for name in list(draft.tensors):
        draft.drop(name)
    for new, old in renamed.items():
        draft.alias(new, old)
    draft.config = _written(draft.config, config)


def renumbered(num_layers: int, removed: Collection[int]) -> dict[int, int]:
    """Old index -> new index of the layers that are kept."""
    return {old: new for new, old in enumerate(index for index in range(num_layers) if index not in removed)}


def _renamed(
    names: Collection[str], anatomy: Anatomy, num_layers: int, removed: Collection[int]
) -> dict[str, str]:
    """New tensor name -> old tensor name."""
    numbers = renumbered(num_layers, removed)
    prefix = anatomy.in_model(anatomy.layers) + "."
    renamed = {}
    for name in names:
        if not name.startswith(prefix):
            renamed[name] = name
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) in numbers:
            renamed[f"{prefix}{numbers[int(index)]}.{rest}"] = name
    return renamed


def _written(before: dict, config: PretrainedConfig) -> dict:
    """config.json after the change: only the keys that changed differ from the file it was."""
    old, new = config_of_dict(before), config.to_dict()
    return before | {key: value for key, value in new.items() if old.get(key) != value}


def config_of_dict(values: dict) -> dict:
    """What transformers makes of a config.json, as a dict again."""
    return config_of(ModelShape(values, {})).to_dict()
