"""From config.json to a transformers config, for plain and for pruned models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import CONFIG_MAPPING, PretrainedConfig

from compress.anatomy import ROWS, anatomy_of, base_class
from compress.errors import BadInput, unknown
from compress.storage import adapter, sharded
from compress.storage.tensors import TensorInfo

NOT_THE_ARCHITECTURE = ("quantization_config", "quantization", "auto_map", adapter.KEY, sharded.KEY)
"""Sections of config.json that say how weights are stored, not what the model computes."""

UNLEARNING = "unlearning"
"""The section of config.json that says what a model does at inference to unlearn (see `at_inference`)."""

UNLEARNED_TYPE = "unlearned_"
UNLEARNED_CLASS = "Unlearned"
"""Prefixes of the model type and of the class names of such a model, before all others: a program that would
load the weights and leave out the rest shall not load it at all."""

PRUNED_TYPE = "pruned_"
PRUNED_CLASS = "Pruned"
"""Prefixes of the model type and of the class names of a model whose layers differ, so that no program takes
it for the plain architecture."""


class Described(Protocol):
    """A checkpoint, or the shape of one: it has a config.json and a table of tensors."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def config_of(checkpoint: Described) -> PretrainedConfig:
    """The transformers config of a checkpoint, of the plain architecture and without a quantization section.

    Raises:
        BadInput: the model type is missing, unknown to transformers, or its values do not validate.
    """
    values = {k: v for k, v in checkpoint.config.items() if k not in NOT_THE_ARCHITECTURE}
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"The architectures in {checkpoint.folder / 'config.json'} are no list of classes.")
    model_type = values.pop("model_type", None)
    for section, kind, start in (
        (UNLEARNING, UNLEARNED_TYPE, UNLEARNED_CLASS),
        ("pruned", PRUNED_TYPE, PRUNED_CLASS),
    ):
        if section in values and isinstance(model_type, str):
            model_type = model_type.removeprefix(kind)
            values["architectures"] = [name.removeprefix(start) for name in names]
    if not isinstance(model_type, str):
        raise BadInput(f"{checkpoint.folder / 'config.json'} does not name a model_type.")
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
        config.architectures = [base_class(config).__name__]
    return config


def _lacks_vocabulary_head(config: PretrainedConfig, checkpoint: Described) -> bool:
    """Whether an encoder's config names a class with a vocabulary head, but the files do not hold the head.

    Published sentence encoders are like this: their config still names the class of their pretraining.
    """
    if config.model_type not in ROWS or ROWS[config.model_type].kind != "encoder":
        return False
    head = anatomy_of(config).head
    return head is not None and not any(
        name.startswith(f"{head.partition('.')[0]}.") for name in checkpoint.tensors
    )
