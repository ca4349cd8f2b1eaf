"""The config.json of a model in a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.gguf.architectures import DECI, ROPE_FACTORS, llama3_factors, rope_frequencies
from compress.storage.gguf.reader import GGUFFile

CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "gptneox": ("gpt_neox", "GPTNeoXForCausalLM"),
}
"""``general.architecture`` -> model type and class of transformers."""


class _Metadata:
    """Numbers of a file, by keys without the architecture."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def number(self, key: str, otherwise: float | None = None) -> Any:
        """A positive number.

        Raises:
            BadInput: it is missing, of another kind, or without sense.
        """
        found = self.file.metadata.get(f"{self.architecture}.{key}", otherwise)
        if isinstance(found, list):
            raise BadInput(
                f"'{self.file.path}' gives '{key}' for every layer; layers that differ cannot be read."
            )
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 2**31:
            raise BadInput(f"'{self.file.path}' lacks a sound value for '{self.architecture}.{key}'.")
        return found

    def count(self, key: str, otherwise: int | None = None) -> int:
        """A number that must be whole.

        Raises:
            BadInput: as `number`, or it is a fraction.
        """
        found = self.number(key, otherwise)
        if not isinstance(found, int):
            raise BadInput(
                f"'{self.file.path}' gives {found} for '{self.architecture}.{key}', a whole number."
            )
        return found

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata


def config_of_gguf(file: GGUFFile) -> dict[str, Any]:
    """What config.json of the model would hold.

    Raises:
        BadInput: the architecture is not supported, or the metadata make no sense.
    """
    name = file.metadata.get("general.architecture")
    if name == DECI.name:
        raise BadInput(
            f"The layers of '{file.path}' may have different widths, which no command reads from a GGUF "
            "file; give the folder that it was made from."
        )
    if not isinstance(name, str) or name not in CLASSES:
        shown = str(name)[:60]
        raise BadInput(
            f"'{file.path}' holds a model of the architecture '{shown}', which is not supported (there are "
            f"{', '.join(CLASSES)})."
        )
    model_type, architecture = CLASSES[name]
    data = _Metadata(file, name)
    if "token_embd.weight" not in file.tensors:
        raise BadInput(f"'{file.path}' lacks the tensor 'token_embd.weight'.")
    found = {
        "model_type": model_type,
        "architectures": [architecture],
        "dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_tokens(file),
    }
    if name == "gpt2":
        return found | {
            "n_positions": data.count("context_length"),
            "n_embd": data.count("embedding_length"),
            "n_layer": data.count("block_count"),
            "n_head": data.count("attention.head_count"),
            "n_inner": data.count("feed_forward_length"),
            "layer_norm_epsilon": data.number("attention.layer_norm_epsilon"),
        }
    width, heads = data.count("embedding_length"), data.count("attention.head_count")
    head_dim = data.count("attention.key_length", width // max(heads, 1))
    turned = data.count("rope.dimension_count", head_dim)
    if head_dim % 2 or turned % 2:
        raise BadInput(f"'{file.path}' has heads of odd width, whose halves no rotary embedding can turn.")
    found |= {
        "max_position_embeddings": data.count("context_length"),
        "hidden_size": width,
        "num_hidden_layers": data.count("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": data.count("feed_forward_length"),
        "rope_parameters": _rope(file, data, turned / max(head_dim, 1)),
    }
    if name == "gptneox":
        return found | {
            "layer_norm_eps": data.number("attention.layer_norm_epsilon"),
            "use_parallel_residual": bool(file.metadata.get("gptneox.use_parallel_residual", True)),
        }
    found |= {
        "num_key_value_heads": data.count("attention.head_count_kv", heads),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
    }
    if name != "phi3":
        found["head_dim"] = head_dim
    return found | _own(file, name, data, head_dim, found)


def _own(file: GGUFFile, name: str, data: _Metadata, head_dim: int, found: dict[str, Any]) -> dict[str, Any]:
    """What only one architecture has."""
    if name == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    if name == "qwen3":
        return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
    if name == "phi3":
        window = data.count("attention.sliding_window", 0)
        return {
            "sliding_window": window or None,
            "pad_token_id": None,
            "original_max_position_embeddings": data.number(
                "rope.scaling.original_context_length", found["max_position_embeddings"]
            ),
        }
    if name not in ("gemma2", "gemma3"):
        return {}
    large = found["num_hidden_layers"] == (46 if name == "gemma2" else 62)
    scalar = found["hidden_size"] // max(found["num_attention_heads"], 1) if large else head_dim
    every = 2 if name == "gemma2" else 6
    own: dict[str, Any] = {
        "query_pre_attn_scalar": scalar,
        "sliding_window": data.count("attention.sliding_window", 4096),
        "layer_types": [
            "full_attention" if (at + 1) % every == 0 else "sliding_attention"
            for at in range(min(found["num_hidden_layers"], 10_000))
        ],
        "final_logit_softcapping": (
            data.number("final_logit_softcapping") if data.has("final_logit_softcapping") else None
        ),
        "attn_logit_softcapping": (
            data.number("attn_logit_softcapping") if data.has("attn_logit_softcapping") else None
        ),
    }
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": data.number("rope.freq_base_swa", 10_000.0)}
        own["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    return own


def _rope(file: GGUFFile, data: _Metadata, share: float) -> dict[str, Any]:
    """The rotary embedding.

    Raises:
        BadInput: it is stretched in a way that only the factors in the file say.
    """
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": data.number("rope.freq_base", 10_000.0)}
    if share != 1.0:
        found["partial_rotary_factor"] = share
    kind = file.metadata.get(f"{data.architecture}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors or "rope_factors_long.weight" in file.tensors:
        llama3 = None
        if ROPE_FACTORS in file.tensors and kind == "none":
            llama3 = _llama3(file.tensor(ROPE_FACTORS).flatten(), found["rope_theta"])
        if llama3 is None:
            raise BadInput(
                f"'{file.path}' stretches its rotary embedding by factors for long contexts, from which "
                "config.json cannot be made again; use the model's own folder."
            )
        return found | llama3
    if kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": data.number("rope.scaling.factor")}
        if kind == "yarn":
            found["original_max_position_embeddings"] = data.number("rope.scaling.original_context_length")
    elif kind != "none":
        raise BadInput(
            f"'{file.path}' stretches its rotary embedding by '{str(kind)[:40]}', which is unknown."
        )
    return found


def _llama3(factors: torch.Tensor, base: float) -> dict[str, Any] | None:
    """The settings of a Llama 3 that give these factors, or None if none do.

    Between fast frequencies, which are kept (1), and slow ones, which are divided by ``factor``, the share
    that is kept is a line over the frequency. It tells where the two begin as shares of the original context,
    so ``low_freq_factor`` is taken to be 1, as in all models of Meta. Where a single frequency lies between,
    ``high_freq_factor`` is taken to be 4 as well; any line through it gives the same factors.
    """
    factor, frequency = float(factors[-1]), rope_frequencies(2 * len(factors), base)
    if not factor > 1:
        return None
    share = (1 / factors.double() - 1 / factor) / (1 - 1 / factor)
    between = (share > 0) & (share < 1)
    x, y = frequency[between], share[between]
    ratio = 4.0
    if len(x) > 1:
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        ratio = float(1 - 1 / (y.mean() - slope * x.mean()))
    length = 2 * math.pi * float(((ratio - 1) * y + 1).mean() / x.mean())
    if not 0.5 < length < 2**31:
        return None
    for digits in (4, 12):  # what people choose, and else what is nearest
        low = round(round(length) / length, digits)
        found = {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": round(low * ratio, digits),
            "original_max_position_embeddings": round(length),
        }
        # llama.cpp's converter computes in float32, which tells most on the slowest frequencies between.
        if torch.allclose(llama3_factors(2 * len(factors), found), factors, rtol=1e-5, atol=0):
            return found
    return None


def _tokens(file: GGUFFile) -> dict[str, Any]:
    found = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[f"{role}_token_id"] = number if isinstance(number, int) else None
    return found
