"""The config.json and the modelling file of a pruned model whose layers differ in shape.

Stock classes build all layers alike. So the config of such a model has a section ``pruned`` with the shape of
each layer, and names two classes of a modelling file in its folder, which transformers runs with
``trust_remote_code=True``. The file is a copy of the module ``compress.engine.pruned`` with these classes,
made for the model's architecture, at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from compress.anatomy import base_class, model_class
from compress.engine import pruned as pruned_module
from compress.engine.config import PRUNED_CLASS, PRUNED_TYPE
from compress.storage.companions import PRUNED_FILE

CLASSES = """

from transformers import {config}, {model}


class Pruned{config}({config}):
    model_type = "pruned_{model_type}"


class Pruned{model}({model}):
    config_class = Pruned{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        reshape(self, config.pruned)
"""

BASE = """

from transformers import AutoModel, {base}


class Pruned{base}({base}):
    config_class = Pruned{config}


# Classes with a task head build their base with AutoModel.
AutoModel.register(Pruned{config}, Pruned{base}, exist_ok=True)
"""


def mark_pruned(
    values: Mapping[str, Any], config: PretrainedConfig, pruned: dict[str, Any]
) -> dict[str, Any]:
    """config.json of a model whose layers differ in shape.

    Args:
        values: config.json of the plain model.
        config: the same as a transformers config.
        pruned: the section that says what shape each layer has (see `compress.engine.pruned.reshape`).
    """
    model = model_class(config)
    classes = vars(modeling_auto).items()  # to list all of transformers takes half a second
    autos = sorted(
        name for name, auto in classes if name.startswith("AutoModel") and _builds(auto, config, model)
    )
    module = PRUNED_FILE.removesuffix(".py")
    return {
        **values,
        "model_type": f"{PRUNED_TYPE}{config.model_type}",
        "architectures": [f"{PRUNED_CLASS}{model.__name__}"],
        "auto_map": {"AutoConfig": f"{module}.{PRUNED_CLASS}{type(config).__name__}"}
        | dict.fromkeys(autos, f"{module}.{PRUNED_CLASS}{model.__name__}"),
        "pruned": pruned,
    }


def _builds(auto: Any, config: PretrainedConfig, model: type[PreTrainedModel]) -> bool:
    """Whether an AutoModel class builds a ``model`` from this config."""
    mapping = getattr(auto, "_model_mapping", None)  # its truth value would import every model there is
    return mapping is not None and type(config) in mapping and mapping[type(config)] is model


def modeling_source(config: PretrainedConfig) -> str:
    """The text of the modelling file, by which transformers alone loads a model whose layers differ."""
    names = {"config": type(config).__name__, "model": model_class(config).__name__}
    text = Path(pruned_module.__file__).read_text(encoding="utf-8")
    text += CLASSES.format(model_type=config.model_type, **names)
    if (base := base_class(config)) is model_class(config):
        return text
    return text + BASE.format(base=base.__name__, **names)
