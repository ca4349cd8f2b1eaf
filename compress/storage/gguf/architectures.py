"""Architectures in GGUF files: names of tensors, the order of rows, and metadata that config.json becomes.

Everything is by the ``model_type`` of transformers. A config is the transformers config object, whose
attributes are the same however old the config.json is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.gguf.package import gguf_package

Metadata = dict[str, Any]
"""Key without the architecture's prefix -> value; floats are stored as float32, ints as uint32. A list has a
value for each layer."""


@dataclass(frozen=True)
class Architecture:
    """How models of one type lie in GGUF files.

    Attributes:
        name: ``general.architecture``.
        family: the name in the gguf package's table of tensor names.
        metadata: what config.json becomes.
        rotated: query and key rows go in pairs of neighbours, and not of halves.
        norm_offset: what is added to the weights of norms.
        transposed: linears are stored [in, out] by transformers.
        interleaved: rows of the fused projection are q, k and v of head 0, then of head 1, and so on.
        head_is_needed: a head that is tied must be written as well.
    """

    name: str
    family: str
    metadata: Callable[[Any], Metadata]
    rotated: bool = False
    norm_offset: float = 0.0
    transposed: bool = False
    interleaved: bool = False
    head_is_needed: bool = False


def architecture_of(config: Any) -> Architecture:
    """The row of the table for a transformers config; `DECI` where the layers differ.

    Raises:
        BadInput: there is none.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise BadInput(
            f"A {config.model_type} model cannot be written as GGUF (that works for "
            f"{', '.join(ARCHITECTURES)}); export it with --format huggingface."
        )
    if not layers_differ(config):
        return found
    if config.model_type not in MAY_DIFFER:
        raise BadInput(
            f"The layers of this {config.model_type} model have different widths, which a GGUF file can hold "
            f"for {', '.join(MAY_DIFFER)} only; prune to a uniform shape, or export it with --format "
            "huggingface."
        )
    return DECI


def layers_differ(config: Any) -> bool:
    """Whether pruning left layers of different widths."""
    return getattr(config, "pruned", None) is not None


def tensor_names(config: Any, names: list[str]) -> dict[str, str]:
    """Name of a tensor in the checkpoint -> name in the GGUF file, in the order given.

    Raises:
        BadInput: llama.cpp has no such tensor.
    """
    package = gguf_package()
    family = getattr(package.MODEL_ARCH, architecture_of(config).family)
    table = package.get_tensor_name_map(family, config.num_hidden_layers)
    found = {}
    for name in names:
        if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")):
            continue  # constants that old files hold
        if (theirs := table.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise BadInput(f"The tensor '{name}' has no place in a GGUF file of a {config.model_type} model.")
        found[name] = theirs
    return found


def limits_of(config: Any) -> list[str]:
    """What llama.cpp does in another way than the model, as sentences."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "phi3" and window and window < config.max_position_embeddings:
        return [
            f"The model looks back {window:,} tokens at most, and llama.cpp without a limit, so on longer "
            "texts it answers differently."
        ]
    return []


def row_order(config: Any, name: str, rows: int) -> torch.Tensor | None:
    """Which row of a weight or bias each row of the GGUF file is, int64 [rows]; None if it is the same one.

    Args:
        config: of the model.
        name: of the tensor in the checkpoint.
        rows: of the tensor, in the order of ``weight`` [out, in].
    """
    form = architecture_of(config)
    module = name.rpartition(".")[0].rpartition(".")[2]
    if form.rotated and module in ("q_proj", "k_proj"):
        return torch.arange(rows).view(-1, 2, _head_dim(config) // 2).transpose(1, 2).flatten()
    if form.interleaved and module == "query_key_value":
        return torch.arange(rows).view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
    return None


def converted(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the checkpoint, float32, as the GGUF file has it."""
    form = architecture_of(config)
    tensor = _turned(form, name, tensor)
    if form.norm_offset and name.endswith("norm.weight"):
        return tensor + form.norm_offset
    order = row_order(config, name, len(tensor))
    return tensor if order is None else tensor[order]


def restored(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `converted`."""
    form = architecture_of(config)
    if form.norm_offset and name.endswith("norm.weight"):
        return tensor - form.norm_offset
    order = row_order(config, name, len(tensor))
    if order is not None:
        tensor = tensor[order.argsort()]
    return _turned(form, name, tensor)


def _turned(form: Architecture, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight of a Conv1D, transposed; any other as it is."""
    is_linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return tensor.t().contiguous() if form.transposed and is_linear else tensor


ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with the factors of a Llama 3."""


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that the file has besides those of the checkpoint, float32: factors of rotary frequencies, and
    what fills up layers that lack a block."""
    found = _zeros(config) if layers_differ(config) else {}
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        found[ROPE_FACTORS] = llama3_factors(_head_dim(config), rope)
    if kind == "longrope":
        for name in ("long", "short"):
            found[f"rope_factors_{name}.weight"] = torch.tensor(list(rope[f"{name}_factor"]))
    return found


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The settings of the rotary embedding; of those layers, where kinds of layers differ."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get(layers) or found) if isinstance(found, Mapping) else {}


def rope_frequencies(width: int, base: float) -> torch.Tensor:
    """The frequencies of a rotary embedding of heads, float64 [width / 2], fastest first."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def llama3_factors(width: int, rope: dict[str, Any]) -> torch.Tensor:
    """By what llama.cpp divides the frequencies of a Llama 3: 1 for fast ones, ``factor`` for slow ones."""
    frequency = rope_frequencies(width, rope["rope_theta"])
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _sizes(config: Any) -> Metadata:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def _gated(config: Any) -> Metadata:
    """Sizes of all models with a gated MLP and RMS norms."""
    return _sizes(config) | {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _widths(config: Any) -> Metadata:
    return {"attention.key_length": _head_dim(config), "attention.value_length": _head_dim(config)}


YARN_LENGTHS = ("attention_factor", "mscale", "mscale_all_dim")
"""Settings of yarn that change how long queries and keys become."""


def _rope(config: Any) -> Metadata:
    """Base and scaling of the rotary embedding.

    Raises:
        BadInput: llama.cpp has no such scaling.
    """
    rope = rope_of(config)
    found: Metadata = {"rope.freq_base": float(rope.get("rope_theta", 10_000.0))}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            length = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            found["rope.scaling.original_context_length"] = length
            usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | dict.fromkeys(YARN_LENGTHS)
            if own := [key for key, value in usual.items() if rope.get(key, value) not in (value, None)]:
                raise BadInput(
                    f"This model stretches its rotary embedding by yarn with its own '{own[0]}', which "
                    "llama.cpp does not read; export it with --format huggingface."
                )
    elif kind not in ("default", "llama3") and (kind, config.model_type) != ("longrope", "phi3"):
        raise BadInput(
            f"This {config.model_type} model stretches its rotary embedding by '{kind}', which llama.cpp "
            "does not do for its type; export it with --format huggingface."
        )
    return found


def _llama(config: Any) -> Metadata:
    _silu(config)
    partial = int(_head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))
    return _gated(config) | _widths(config) | _rope(config) | {"rope.dimension_count": partial}


def _mistral(config: Any) -> Metadata:
    if (window := config.sliding_window) and window < config.max_position_embeddings:
        raise BadInput(
            f"This mistral model looks back {window} tokens at most, which llama.cpp does not do for its "
            "type; export it with --format huggingface."
        )
    return _llama(config)


def _qwen(config: Any) -> Metadata:
    _silu(config)
    if config.model_type == "qwen3":
        _needs(config, "attention_bias", False)
    if getattr(config, "use_sliding_window", False):
        raise BadInput(
            "This model has layers that look back a limited number of tokens, which llama.cpp does not do "
            "for its type; export it with --format huggingface."
        )
    return _gated(config) | _widths(config) | _rope(config)


def _silu(config: Any) -> None:
    _activation(config, "hidden_act", "silu", "swish")


def _activation(config: Any, key: str, *names: str) -> None:
    """Refuse (BadInput) another activation function, which llama.cpp would not compute."""
    if (found := getattr(config, key)) not in names:
        raise BadInput(
            f"This {config.model_type} model has the activation function '{found}', and llama.cpp computes "
            f"{names[0]} for its type; export it with --format huggingface."
        )


def _needs(config: Any, key: str, value: bool) -> None:
    """Refuse (BadInput) another setting, which llama.cpp does not know for this type."""
    if bool(getattr(config, key, value)) is not value:
        raise BadInput(
            f"This {config.model_type} model has {key} = {not value}, which llama.cpp does not do for its "
            "type; export it with --format huggingface."
        )


def _gemma(config: Any) -> Metadata:
    _activation(config, "hidden_activation", "gelu_pytorch_tanh", "gelu_new")
    found = _gated(config) | _widths(config) | _rope(config)
    if getattr(config, "sliding_window", None):
        found["attention.sliding_window"] = config.sliding_window
    for key, value in (
        ("final_logit_softcapping", config.final_logit_softcapping),
        ("attn_logit_softcapping", config.attn_logit_softcapping),
    ):
        if value is not None:
            found[key] = float(value)
    wide = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)  # the models of 27 B
    expected = config.hidden_size / config.num_attention_heads if wide else _head_dim(config)
    if config.query_pre_attn_scalar != expected:
        raise BadInput(
            f"This model divides queries by the root of {config.query_pre_attn_scalar}, and llama.cpp by "
            f"that of {expected:g}; export it with --format huggingface."
        )
    return found


def _gemma2(config: Any) -> Metadata:
    _pattern(config, 2)
    if config.final_logit_softcapping is None or config.attn_logit_softcapping is None:
        raise BadInput(
            "This gemma2 model does not limit its logits, which llama.cpp does for its type; export it with "
            "--format huggingface."
        )
    return _gemma(config)


def _gemma3(config: Any) -> Metadata:
    _pattern(config, 6)
    local = rope_of(config, "sliding_attention").get("rope_theta", 10_000.0)
    return _gemma(config) | {"rope.freq_base_swa": float(local)}


def _pattern(config: Any, every: int) -> None:
    """Refuse (BadInput) layers that do not alternate as llama.cpp takes for granted."""
    expected = [
        "full_attention" if (at + 1) % every == 0 else "sliding_attention"
        for at in range(config.num_hidden_layers)
    ]
    if config.layer_types != expected:
        raise BadInput(
            f"llama.cpp takes it for granted that every {every}th layer of a {config.model_type} model looks "
            "back without limit, and this model has another pattern (were layers removed?); export it with "
            "--format huggingface."
        )


def _phi3(config: Any) -> Metadata:
    _silu(config)
    rope = rope_of(config)
    partial = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    window = config.sliding_window or 0
    found = (
        _gated(config)
        | _rope(config)
        | {
            "rope.dimension_count": partial,
            "rope.scaling.original_context_length": rope.get("original_max_position_embeddings", original),
            "attention.sliding_window": window if window < config.max_position_embeddings else 0,
        }
    )
    if rope.get("rope_type") == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # Published configs leave it to transformers, and llama.cpp takes 1 if the file does not say it.
        found["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1])
    return found


def _gpt2(config: Any) -> Metadata:
    _activation(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _needs(config, "scale_attn_weights", True)
    _needs(config, "scale_attn_by_inverse_layer_idx", False)
    return _sizes(config) | {
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _gpt_neox(config: Any) -> Metadata:
    _activation(config, "hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    _needs(config, "attention_bias", True)
    share = rope_of(config).get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    return (
        _sizes(config)
        | _rope(config)
        | {
            "feed_forward_length": config.intermediate_size,
            "attention.layer_norm_epsilon": float(config.layer_norm_eps),
            "rope.dimension_count": int(_head_dim(config) * share),
            "use_parallel_residual": bool(config.use_parallel_residual),
        }
    )


FILL = 32
"""Neurons of the MLP of zeros that a layer without one gets."""


def _filled(config: Any) -> list[tuple[int, int, int]]:
    """Query heads, key-value heads and neurons of each layer in the file.

    llama.cpp drops the attention of a layer without an MLP, and reads no width of heads where the first layer
    has none. So the first layer has an attention block there and every layer an MLP, if need be of zeros.
    """
    found = []
    for index, layer in enumerate(config.pruned["layers"]):
        heads = layer["num_attention_heads"], layer["num_key_value_heads"]
        found.append((*(heads if heads[0] or index else (1, 1)), layer["intermediate_size"] or FILL))
    return found


def _zeros(config: Any) -> dict[str, torch.Tensor]:
    """The blocks that `_filled` adds, which change nothing."""
    size, found = config.hidden_size, dict[str, torch.Tensor]()
    for index, (layer, filled) in enumerate(zip(config.pruned["layers"], _filled(config), strict=True)):
        heads, width = filled[0] * _head_dim(config), filled[2]
        parts: dict[str, torch.Tensor] = {}
        if filled[0] and not layer["num_attention_heads"]:
            parts |= {"attn_norm": torch.ones(size), "attn_output": torch.zeros(size, heads)}
            parts |= {f"attn_{name}": torch.zeros(heads, size) for name in "qkv"}
        if not layer["intermediate_size"]:
            parts |= {"ffn_norm": torch.ones(size), "ffn_down": torch.zeros(size, width)}
            parts |= {f"ffn_{name}": torch.zeros(width, size) for name in ("gate", "up")}
        found |= {f"blk.{index}.{name}.weight": tensor for name, tensor in parts.items()}
    return found


def _deci(config: Any) -> Metadata:
    """Those of the model before pruning, with widths for each layer."""
    found = ARCHITECTURES[config.model_type].metadata(config)
    width = _head_dim(config)
    if found.setdefault("rope.dimension_count", width) != width:
        raise BadInput(
            "This model turns a part of each head alone, which GGUF files cannot say where layers have "
            "different widths; export it with --format huggingface."
        )
    heads, groups, neurons = (list(column) for column in zip(*_filled(config), strict=True))
    return found | {
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "feed_forward_length": neurons,
    }


MAY_DIFFER = ("llama", "mistral", "qwen2")
"""The model types whose layers may differ: those that compute what a Llama does, with or without biases."""

DECI = Architecture("deci", "DECI", _deci, rotated=True)
"""How models lie in GGUF files whose layers differ: as DeciLM, which computes what a Llama does."""

ARCHITECTURES = {
    "llama": Architecture("llama", "LLAMA", _llama, rotated=True),
    "mistral": Architecture("llama", "LLAMA", _mistral, rotated=True),
    "qwen2": Architecture("qwen2", "QWEN2", _qwen),
    "qwen3": Architecture("qwen3", "QWEN3", _qwen),
    "gemma2": Architecture("gemma2", "GEMMA2", _gemma2, norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", "GEMMA3", _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", "PHI3", _phi3),
    "gpt2": Architecture("gpt2", "GPT2", _gpt2, transposed=True),
    "gpt_neox": Architecture("gptneox", "GPTNEOX", _gpt_neox, interleaved=True, head_is_needed=True),
}
"""``model_type`` of transformers -> how its models lie in GGUF files."""
