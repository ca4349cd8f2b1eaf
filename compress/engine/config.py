"""The transformers config of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig

from compress.anatomy import ROWS, anatomy_of
from compress.errors import BadInput, unknown
from compress.storage import adapter
from compress.storage.tensors import TensorInfo

NOT_THE_ARCHITECTURE = ("quantization_config", "auto_map", adapter.KEY)
"""Sections of config.json about how weights are stored."""

PRUNED_TYPE = "pruned_"
PRUNED_CLASS = "Pruned"
"""What stands before the model type and the class names of a model whose layers differ, so that no program
takes it for the plain architecture."""


class Described(Protocol):
    """A checkpoint, or the shape of one: it has a config.json and a table of tensors."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def config_of(checkpoint: Described) -> PretrainedConfig:
    """The transformers config of a checkpoint, without its quantization section.

    Raises:
        BadInput: the model type is missing, unknown to transformers, or its values do not validate.
    """
    values = {k: v for k, v in checkpoint.config.items() if k not in NOT_THE_ARCHITECTURE}
    model_type = values.pop("model_type", None)
    if "pruned" in values and isinstance(model_type, str):
        model_type = model_type.removeprefix(PRUNED_TYPE)
        names = values.get("architectures") or []
        values["architectures"] = [name.removeprefix(PRUNED_CLASS) for name in names]
    if not isinstance(model_type, str):
        raise BadInput(f"{checkpoint.folder / 'config.json'} names no model_type.")
    if model_type not in CONFIG_MAPPING:
        raise unknown("model type", model_type, CONFIG_MAPPING.keys())
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # transformers raises its validators' own types here
        reason = " ".join(str(error).split())
        raise BadInput(
            f"{checkpoint.folder / 'config.json'} is not a valid {model_type} config: {reason}"
        ) from None
    if _lacks_vocabulary_head(config, checkpoint):
        config.architectures = [MODEL_MAPPING[type(config)].__name__]
    return config


def _lacks_vocabulary_head(config: PretrainedConfig, checkpoint: Described) -> bool:
    """Whether an encoder's config names a vocabulary head that its files do not hold.

    Published sentence encoders keep the class they were pretrained as in their config.
    """
    if config.model_type not in ROWS or ROWS[config.model_type].kind != "encoder":
        return False
    head = anatomy_of(config).head
    return head is not None and not any(
        name.startswith(f"{head.partition('.')[0]}.") for name in checkpoint.tensors
    )
