"""Architectures as data: one table says where everything is in a transformer; methods ask it by role.

To support another model type, add a row to ``ROWS`` (and its config to ``tests/unit/test_anatomy.py``, which
checks every role of every row on a tiny model). Nothing outside this table tests a model type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PROJECTIONS = ("query", "key", "value", "attention_output", "gate", "up", "down")
NORMS = ("attention_norm", "query_norm", "key_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
Task = Literal["sequence classification", "token classification", "question answering"]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the parts of one architecture are, as module paths. Take one from :func:`anatomy_of`."""

    model_type: str
    kind: Literal["decoder", "encoder"]

    # Relative to the base model (``model.base_model``); ``in_model`` makes them relative to the full model.
    layers: str
    embeddings: tuple[str, ...]  # token embedding first, then position and type tables, input projection
    embedding_norm: str | None = None
    final_norm: str | None = None
    final_projection: str | None = None  # from hidden_size to the width of the token embedding (OPT-350m)

    # Relative to the full model: projection to the vocabulary, None where the class has none.
    head: str | None
    head_aliases: tuple[str, ...] = ()  # what checkpoint files, or older classes, may call it instead

    # Relative to one layer. Paths that are equal are one fused linear.
    attention: str
    attention_core: str | None = (
        None  # what takes hidden states to heads, where a residual sum is in ``attention``
    )
    query: str
    key: str
    value: str
    attention_output: str
    mlp: str | None  # None where the MLP is not one module
    gate: str | None = None  # a fused gate and up is stacked, gate first
    up: str
    down: str
    # Rows of a fused projection: "stacked" is all of q, then k, then v; "interleaved" is q, k and v of head
    # 0, then of head 1, and so on.
    qkv_layout: Literal["separate", "stacked", "interleaved"] = "separate"
    conv1d: bool = False  # weights are stored [in, out]

    # Relative to one layer. attention_norm and mlp_norm come before their block if norm_first, else after its
    # residual addition; post_attention_norm and post_mlp_norm act on a block's output before it is added.
    attention_norm: str
    mlp_norm: str
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_first: bool = True
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    parallel_residual: bool = False  # attention and MLP both read the layer's input

    # Names in the config. Without ``head_dim`` in it, heads can only be as wide as hidden_size / heads. The
    # keys of biases give one to every projection of a block, and are None where the class leaves no choice.
    intermediate_size_key: str = "intermediate_size"
    has_head_dim: bool = False
    attention_bias_key: str | None = None
    mlp_bias_key: str | None = None
    attention_reads_config: bool = False  # the number of heads, at every call
    shared_position_bias: bool = False  # layers are given the bias of every head, computed once for all
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    layer_thresholds: tuple[str, ...] = ("max_window_layers",)  # layer indices where something changes

    # Filled in by anatomy_of.
    prefix: str = ""  # of the base model inside the full model; empty for a bare base model
    tied: bool = False  # head and token embedding are one tensor

    def in_model(self, path: str) -> str:
        """The path inside the full model of a path inside the base model."""
        return f"{self.prefix}.{path}" if self.prefix else path

    def layer_name(self, index: int) -> str:
        """The name of a layer in the full model's ``state_dict``, e.g. ``model.layers.3``."""
        return self.in_model(f"{self.layers}.{index}")

    def located(self, names: Iterable[str]) -> Anatomy:
        """The same anatomy with ``prefix`` and ``head`` as the tensor ``names`` of a checkpoint have them.

        Checkpoints on the hub may differ from the class in their config: gpt2 is saved without
        ``transformer.``, sentence-transformers encoders without ``mpnet.``, Pythia's head is ``embed_out``.

        Raises:
            BadInput: there is no first layer among the names.
        """
        names = dict.fromkeys(names)
        first = f"{self.layers}.0"
        inside = next((name for name in names if f".{first}." in f".{name}"), None)
        if inside is None:
            raise BadInput(f"The checkpoint has no '{first}', so it is not a whole {self.model_type} model.")
        prefix = f".{inside}".partition(f".{first}.")[0].removeprefix(".")
        modules = {name.rpartition(".")[0] for name in names}  # not of weights only: these may be packed
        aliases = (alias for alias in self.head_aliases if alias in modules)
        return replace(self, prefix=prefix, head=self.head and next(aliases, self.head))

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """Every linear of a layer once, in data-flow order; a fused one stands where its first part would."""
        return self._paths(PROJECTIONS)

    @property
    def norm_paths(self) -> tuple[str, ...]:
        """Every norm of a layer."""
        return self._paths(NORMS)

    def _paths(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for role in roles if (path := getattr(self, role)) is not None))

    def linears(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Every linear of a layer (``nn.Linear`` or ``Conv1D``) by its path, in data-flow order."""
        modules = dict(layer.named_modules())
        here = (path for path in self.linear_paths if path in modules)
        return {path: modules[path] for path in here if hasattr(modules[path], "bias")}  # no removed block

    def projection_rows(self, config: PretrainedConfig, index: int = 0) -> dict[str, Tensor]:
        """Which rows of :func:`weight` (and of the bias) are whose in layer ``index``.

        Returns:
            int64 indices by role: ``query`` [num_attention_heads, head_dim], ``key`` and ``value``
            [num_key_value_heads, head_dim], ``up`` and, where there is one, ``gate`` [intermediate_size].
        """
        shape, width = layer_shapes(config)[index], sizes_of(config).head_dim
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        query = torch.arange(heads * width).view(heads, width)
        key = value = torch.arange(kv_heads * width).view(kv_heads, width)
        if self.qkv_layout == "stacked":
            key, value = key + query.numel(), value + query.numel() + key.numel()
        elif self.qkv_layout == "interleaved":
            query, key, value = torch.arange(3 * heads * width).view(heads, 3, width).unbind(1)
        rows = {"query": query, "key": key, "value": value}
        rows["up"] = torch.arange(shape.intermediate_size)
        if self.gate is not None:
            rows["gate"] = rows["up"]
            if self.gate == self.up:
                rows["up"] = rows["up"] + shape.intermediate_size
        return rows

    @property
    def merge_obstacle(self) -> str | None:
        """Why a linear map of the MLP's contribution cannot be folded into ``down``: a sentence, or None."""
        if self.post_mlp_norm is not None:
            return (
                f"In {self.model_type} models '{self.post_mlp_norm}' normalises the output of '{self.down}' "
                "before it joins the residual stream, so a linear map cannot be folded into that projection."
            )
        if not self.norm_first:
            return (
                f"This {self.model_type} model is post-norm: '{self.mlp_norm}' normalises the sum after "
                f"'{self.down}' is added, so a linear map cannot be folded into that projection."
            )
        return None

    @property
    def refit_obstacle(self) -> str | None:
        """Why the output projections of the blocks cannot be refitted to the residual stream by linear least
        squares: a sentence, or None."""
        for norm, path in (
            (self.post_attention_norm, self.attention_output),
            (self.post_mlp_norm, self.down),
        ):
            if norm is not None:
                return (
                    f"In {self.model_type} models '{norm}' normalises the output of '{path}' before it joins "
                    "the residual stream, so that projection cannot be fitted to the stream by least squares."
                )
        return None

    @property
    def mlp_output_mergeable(self) -> bool:
        """Whether the output of ``down`` is exactly what is added to the residual stream."""
        return self.merge_obstacle is None


# fmt: off
_LLAMA = Anatomy(
    model_type="llama", kind="decoder",
    layers="layers", embeddings=("embed_tokens",), final_norm="norm", head="lm_head",
    attention="self_attn", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    has_head_dim=True, attention_bias_key="attention_bias", mlp_bias_key="mlp_bias",
)
_QWEN3 = replace(
    _LLAMA, model_type="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", mlp_bias_key=None
)
_PLAIN = {"attention_bias_key": None, "mlp_bias_key": None}
_GEMMA2 = replace(
    _LLAMA, model_type="gemma2", mlp_bias_key=None, norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm",
)
_GEMMA3 = replace(_GEMMA2, model_type="gemma3_text", query_norm=_QWEN3.query_norm, key_norm=_QWEN3.key_norm)
_PHI3 = replace(
    _LLAMA, model_type="phi3", **_PLAIN, attention_reads_config=True,
    query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj", qkv_layout="stacked",
    gate="mlp.gate_up_proj", up="mlp.gate_up_proj",
)
_OPT = replace(
    _LLAMA, model_type="opt", **_PLAIN, has_head_dim=False,
    layers="decoder.layers", embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    final_norm="decoder.final_layer_norm",
    attention_output="self_attn.out_proj",
    mlp=None, gate=None, up="fc1", down="fc2", intermediate_size_key="ffn_dim",
    attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm",
)
_GPT2 = replace(
    _LLAMA, model_type="gpt2", **_PLAIN, has_head_dim=False,
    layers="h", embeddings=("wte", "wpe"), final_norm="ln_f",
    attention="attn", query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", qkv_layout="stacked",
    attention_output="attn.c_proj", conv1d=True,
    gate=None, up="mlp.c_fc", down="mlp.c_proj", intermediate_size_key="n_inner",
    attention_norm="ln_1", mlp_norm="ln_2",
)
_GPT_NEOX = replace(
    _LLAMA, model_type="gpt_neox", **_PLAIN, has_head_dim=False,
    embeddings=("embed_in",), final_norm="final_layer_norm", head_aliases=("embed_out",),
    attention="attention", query="attention.query_key_value", key="attention.query_key_value",
    value="attention.query_key_value", qkv_layout="interleaved", attention_output="attention.dense",
    gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)
_BERT = Anatomy(
    model_type="bert", kind="encoder",
    layers="encoder.layer", embedding_norm="embeddings.LayerNorm", head="cls.predictions.decoder",
    embeddings=tuple(f"embeddings.{table}_embeddings" for table in ("word", "position", "token_type")),
    attention="attention", attention_core="attention.self", attention_output="attention.output.dense",
    query="attention.self.query", key="attention.self.key", value="attention.self.value",
    mlp=None, up="intermediate.dense", down="output.dense",
    attention_norm="attention.output.LayerNorm", mlp_norm="output.LayerNorm", norm_first=False,
)
_MPNET = replace(
    _BERT, model_type="mpnet", head="lm_head.decoder",
    embeddings=(*_BERT.embeddings[:2], "encoder.relative_attention_bias"),
    query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    attention_output="attention.attn.o", attention_norm="attention.LayerNorm",
    attention_core="attention.attn", shared_position_bias=True,
)
_DISTILBERT = replace(
    _BERT, model_type="distilbert",
    layers="transformer.layer", embeddings=_BERT.embeddings[:2], head="vocab_projector",
    query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    attention_output="attention.out_lin", attention_core=None,
    mlp="ffn", up="ffn.lin1", down="ffn.lin2", intermediate_size_key="hidden_dim",
    attention_norm="sa_layer_norm", mlp_norm="output_layer_norm",
)
_SAME = (
    replace(_LLAMA, model_type="mistral", **_PLAIN),
    replace(_LLAMA, model_type="qwen2", **_PLAIN),
    replace(_BERT, model_type="roberta", head="lm_head.decoder"),
)
# fmt: on

ROWS: dict[str, Anatomy] = {
    row.model_type: row
    for row in (
        *(_LLAMA, _QWEN3, _GEMMA2, _GEMMA3, _PHI3, _OPT, _GPT2, _GPT_NEOX),
        *(_BERT, _MPNET, _DISTILBERT),
        *_SAME,
    )
}


def _opt_variant(config: Any) -> dict[str, Any]:
    variant: dict[str, Any] = {"norm_first": config.do_layer_norm_before}
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        variant["final_norm"] = None
    if config.word_embed_proj_dim != config.hidden_size:
        variant["embeddings"] = (*_OPT.embeddings, "decoder.project_in")
        variant["final_projection"] = "decoder.project_out"
    return variant


# What of a row depends on the config.
VARIANTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "opt": _opt_variant,
    "gpt_neox": lambda config: {"parallel_residual": config.use_parallel_residual},
}


def _row(config: PretrainedConfig) -> Anatomy:
    row = ROWS.get(config.model_type)
    if row is None:
        raise BadInput(
            f"The model type '{config.model_type}' is not supported (there are {', '.join(sorted(ROWS))}); "
            "to support it, add a row that names its modules to ROWS in compress/anatomy.py."
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
    # A class with a vocabulary head says in this table what the head is tied to when it is tied. Its name may
    # depend on the release of transformers (GPT-NeoX).
    names = (row.head, *row.head_aliases)
    head = next((name for name in names if f"{name}.weight" in (cls._tied_weights_keys or {})), None)
    return replace(
        row,
        **VARIANTS.get(row.model_type, lambda _: {})(config),
        prefix="" if cls is transformers.MODEL_MAPPING[type(config)] else cls.base_model_prefix,
        head=head,
        head_aliases=tuple(name for name in names if name != head) if head else row.head_aliases,
        tied=head is not None and config.tie_word_embeddings,
    )


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers itself (never remote code) that ``config.architectures`` names.

    For a decoder that names none of them it is the causal language model of its type.

    Raises:
        BadInput: an encoder, whose head could be anything, names no class of transformers.
    """
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if is_model and isinstance(config, cls.config_class or ()):
        return cls
    if _row(config).kind == "decoder":
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    problem = f"is '{name}', which transformers does not have" if name else "is missing"
    raise BadInput(
        f'The architecture in the config of this {config.model_type} model {problem}; set "architectures" to '
        f'the class to build, for instance ["{transformers.MODEL_MAPPING[type(config)].__name__}"].'
    )


def task_of(config: PretrainedConfig) -> Task | None:
    """What the head of the model is for; None for a vocabulary head, another head, or none at all.

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
    return Sizes(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate_size=getattr(config, row.intermediate_size_key) or 4 * hidden,  # n_inner may be None
    )


@dataclass(frozen=True)
class LayerShape:
    """The widths of one layer; without attention heads, or neurons, it has no such block."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


def layer_shapes(config: PretrainedConfig) -> list[LayerShape]:
    """The widths of every layer: equal ones, unless the config has a section ``pruned``."""
    sizes = sizes_of(config)
    names = [field.name for field in fields(LayerShape)]
    pruned = getattr(config, "pruned", None)
    each = pruned["layers"] if pruned else [vars(sizes)] * sizes.num_hidden_layers
    return [LayerShape(*(layer[name] for name in names)) for layer in each]


def without_layers(config: PretrainedConfig, removed: Collection[int]) -> PretrainedConfig:
    """A copy of ``config`` for the model that is left when the layers with the ``removed`` indices are gone.

    Raises:
        BadInput: an index is out of range, no layer would be left, or what a layer does depends on its index.
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


def weight(linear: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` or ``Conv1D`` as [out, in]; a view, without gradient."""
    stored = linear.weight.detach()
    return stored.T if isinstance(linear, Conv1D) else stored


def set_weight(linear: nn.Module, new: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear the weight ``new`` [out, in], of any shape, and ``bias`` [out]; None keeps the old one.

    The parameters are replaced by copies in the dtype and on the device of the old weight.

    Raises:
        ValueError: the bias does not have one entry for each row of the weight.
    """
    if bias is None and linear.bias is not None:
        bias = linear.bias.detach()
    if bias is not None and bias.shape != new.shape[:1]:
        raise ValueError(f"a bias of {tuple(bias.shape)} does not fit a weight of {tuple(new.shape)}")

    def parameter(value: Tensor) -> nn.Parameter:
        value = value.detach().to(linear.weight).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(value, requires_grad=linear.weight.requires_grad)

    transposed = isinstance(linear, Conv1D)
    if bias is not None:
        linear.bias = parameter(bias)
    linear.weight = parameter(new.T if transposed else new)
    widths = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, width in zip(widths, new.shape, strict=True):
        setattr(linear, name, width)
