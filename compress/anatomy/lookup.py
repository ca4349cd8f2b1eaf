"""The anatomy, the class, the task and the sizes of the model that a config describes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from compress.anatomy.roles import Anatomy, Task
from compress.anatomy.rows import ROWS, VARIANTS
from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _row(config: PretrainedConfig) -> Anatomy:
    row = ROWS.get(config.model_type)
    if row is None:
        raise BadInput(
            f"The model type '{config.model_type}' is not supported (there are {', '.join(sorted(ROWS))}); "
            "to support it, add a row that names its modules to ROWS in compress/anatomy/rows.py."
        )
    for flag, what in (
        ("add_cross_attention", "layers with cross-attention"),
        ("is_heterogeneous", "layers of different shapes (per_layer_config)"),
    ):
        if getattr(config, flag, False):
            raise BadInput(f"This {row.model_type} model has {what}, which is not supported for its type.")
    if row.kind == "encoder" and getattr(config, "is_decoder", False):
        raise BadInput(f"This {row.model_type} model is a decoder; only its encoder form is supported.")
    return row


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """The anatomy of the model that ``config`` describes, as the class in ``config.architectures`` builds it.

    Raises:
        BadInput: the model type has no row, or the config asks for parts that its row does not describe.
    """
    row = _row(config)
    cls = model_class(config)
    # In this table a class with a vocabulary head says to what the head may be tied. The name of the head may
    # depend on the release of transformers (GPT-NeoX).
    names = tuple(name for name in (row.head, *row.head_aliases) if name is not None)
    head = next((name for name in names if f"{name}.weight" in (cls._tied_weights_keys or {})), None)
    return replace(
        row,
        **VARIANTS.get(row.model_type, lambda _: {})(config),
        prefix="" if cls is base_class(config) else cls.base_model_prefix,
        head=head,
        head_aliases=tuple(name for name in names if name != head) if head else row.head_aliases,
        tied=head is not None and config.tie_word_embeddings,
    )


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config.architectures`` names, if it is one of transformers itself (never remote code).

    For a decoder that names no such class it is the causal language model of its type.

    Raises:
        BadInput: an encoder, whose head could be anything, names no class of transformers.
    """
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if cls is not None and is_model and isinstance(config, cls.config_class or ()):
        return cls
    if _row(config).kind == "decoder":
        return _mapped(transformers.MODEL_FOR_CAUSAL_LM_MAPPING, config)
    problem = f"is '{name}', which transformers does not have" if name else "is missing"
    raise BadInput(
        f'The architecture in the config of this {config.model_type} model {problem}; set "architectures" to '
        f'the class to build, for instance ["{base_class(config).__name__}"].'
    )


def base_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the bare model of a type, without a head."""
    return _mapped(transformers.MODEL_MAPPING, config)


def _mapped(mapping: Mapping[Any, Any], config: PretrainedConfig) -> type[PreTrainedModel]:
    return mapping[type(config)]  # transformers declares that it may be a tuple, which these mappings lack


def task_of(config: PretrainedConfig) -> Task | None:
    """The task of the model's head; None for a vocabulary head, any other head, or no head.

    Raises:
        BadInput: as :func:`model_class`.
    """
    mappings: dict[Task, Any] = {
        "sequence classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token classification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "question answering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    }
    cls, key = model_class(config), type(config)
    return next((task for task, classes in mappings.items() if key in classes and classes[key] is cls), None)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, under one set of names for every type."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


def sizes_of(config: PretrainedConfig) -> Sizes:
    """The sizes that ``config`` gives under the names of its own type.

    Raises:
        BadInput: as :func:`anatomy_of`.
    """
    row = _row(config)
    heads, hidden = config.num_attention_heads, config.hidden_size
    grouped = hasattr(type(config), "num_key_value_heads")

    def read(name: str, used: bool) -> int | None:  # the class may ignore what the config says
        return getattr(config, name, None) if used else None

    return Sizes(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=read("num_key_value_heads", grouped) or heads,
        head_dim=read("head_dim", row.has_head_dim) or hidden // heads,
        intermediate_size=getattr(config, row.intermediate_size_key) or 4 * hidden,  # n_inner may be None
    )


@dataclass(frozen=True)
class LayerShape:
    """The widths of one layer. A layer without heads has no attention block, one without neurons no MLP."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


def layer_shapes(config: PretrainedConfig) -> list[LayerShape]:
    """The widths of every layer; they are equal unless the config has a section ``pruned``."""
    sizes = sizes_of(config)
    names = [field.name for field in fields(LayerShape)]
    pruned = getattr(config, "pruned", None)
    each = pruned["layers"] if pruned else [vars(sizes)] * sizes.num_hidden_layers
    return [LayerShape(*(layer[name] for name in names)) for layer in each]


def projection_rows(config: PretrainedConfig, index: int = 0) -> dict[str, Tensor]:
    """Which rows of :func:`weight` (and of the bias) belong to which head or neuron in layer ``index``.

    Returns:
        int64 indices by role: ``query`` [num_attention_heads, head_dim], ``key`` and ``value``
        [num_key_value_heads, head_dim], ``up`` and, where there is one, ``gate`` [intermediate_size].

    Raises:
        BadInput: as :func:`anatomy_of`.
    """
    row, shape, width = _row(config), layer_shapes(config)[index], sizes_of(config).head_dim
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    query = torch.arange(heads * width).view(heads, width)
    key = value = torch.arange(kv_heads * width).view(kv_heads, width)
    if row.qkv_layout == "stacked":
        key, value = key + query.numel(), value + query.numel() + key.numel()
    elif row.qkv_layout == "interleaved":
        query, key, value = torch.arange(3 * heads * width).view(heads, 3, width).unbind(1)
    rows = {"query": query, "key": key, "value": value}
    rows["up"] = torch.arange(shape.intermediate_size)
    if row.gate is not None:
        rows["gate"] = rows["up"]
        if row.gate == row.up:
            rows["up"] = rows["up"] + shape.intermediate_size
    return rows


def without_layers(config: PretrainedConfig, removed: Collection[int]) -> PretrainedConfig:
    """A copy of ``config`` for the model without the layers whose indices are ``removed``.

    Raises:
        BadInput: an index is out of range, no layer would be left, or the computation of a layer depends on
            its index.
    """
    row, count = _row(config), config.num_hidden_layers
    removed = set(removed)
    if wrong := sorted(index for index in removed if not 0 <= index < count):
        raise BadInput(f"There is no layer {wrong[0]} to remove: the model has layers 0 to {count - 1}.")
    kept = [index for index in range(count) if index not in removed]
    if not kept:
        raise BadInput(f"Removing all {count} layers leaves no model; keep at least one.")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and kept != list(range(len(kept))):
        raise BadInput(
            "This model scales attention by the layer's index (scale_attn_by_inverse_layer_idx), so only its "
            "last layers can be removed."
        )
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = len(kept)
    for name in row.per_layer_lists:
        if (values := getattr(config, name, None)) is not None:
            setattr(shorter, name, [values[index] for index in kept])
    if (pruned := getattr(shorter, "pruned", None)) is not None:
        pruned["layers"] = [pruned["layers"][index] for index in kept]
    for name in row.layer_thresholds:
        if (threshold := getattr(config, name, None)) is not None:
            setattr(shorter, name, threshold - sum(index < threshold for index in removed))
    shorter.validate()
    return shorter
