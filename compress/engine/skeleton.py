"""Transformers models that are built without memory for their weights."""

from __future__ import annotations

import logging
import sys

import torch
from transformers import PretrainedConfig, PreTrainedModel

from compress.anatomy import anatomy_of, model_class
from compress.engine.at_inference import AtInference, act_at_inference
from compress.engine.key_values import KeyValueSettings, quantize_key_values
from compress.engine.pruned import reshape
from compress.errors import BadInput, CompressError

log = logging.getLogger(__name__)


def skeleton(config: PretrainedConfig, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model that a config describes: pruned, with quantized keys and values, or unlearning at inference,
    if the config says so.

    It is in evaluation mode. Its parameters are on the meta device and take no memory; its buffers that no
    checkpoint holds (rotary frequencies, embedding scales) are computed on ``device``.

    Raises:
        BadInput: the config does not name a class, or describes what cannot be built, or its section on keys
            and values is not valid.
    """
    cls = model_class(config)
    try:
        model = _built(cls, config, device)
    except CompressError:
        raise
    except Exception as error:  # of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(
            f"config.json describes a {config.model_type} model that cannot be built ({reason})."
        ) from error
    if (settings := KeyValueSettings.of(config)) is not None:
        quantize_key_values(model, settings)
    if (unlearning := AtInference.of(config)) is not None:
        act_at_inference(model, unlearning, device)
    model.requires_grad_(False)
    return model.eval()


def _built(
    cls: type[PreTrainedModel], config: PretrainedConfig, device: str | torch.device
) -> PreTrainedModel:
    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if names:
                for name in names:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
                model._init_weights(module)
    if (pruned := getattr(config, "pruned", None)) is not None:
        reshape(model, pruned)
    return model


def longest_input(model: PreTrainedModel) -> int:
    """The largest number of tokens that the model has positions for, or ``sys.maxsize`` if it has no limit.

    In RoBERTa and models like it the first positions, up to that of the padding, are never used. A sliding
    window limits what a token sees, not how many tokens there may be.
    """
    longest = _positions(model.config)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - module.padding_idx - 1
    return longest


def _positions(config: PretrainedConfig) -> int:
    """``max_position_embeddings``, times the factor of the scaled rotary positions that it leaves out."""
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}  # of each type of layers, or of all of them
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):  # the other types count it in
        before = rope.get("original_max_position_embeddings") or longest
        return max(longest, int(before * rope["factor"]))
    return longest


def check_positions(model: PreTrainedModel, length: int, advice: str) -> None:
    """Make sure that a model has positions for a text. Rotary positions have no limit.

    Args:
        length: tokens of the text.
        advice: what to do about a longer one, for the message.

    Raises:
        BadInput: the text is longer than the model's table of positions.
    """
    # Embedding tables after that of the tokens hold positions.
    if len(anatomy_of(model.config).embeddings) > 1 and length > (longest := longest_input(model)):
        raise BadInput(f"The model has positions for {longest} tokens, and {length} come at once; {advice}.")


def window_length(model: PreTrainedModel, wanted: int | None, default: int) -> int:
    """Tokens in a window: as many as ``wanted``, or else ``default``, if the model has positions for so many.

    A warning is logged if more tokens are wanted than the model has rotary positions for.
    """
    longest = longest_input(model)
    if wanted is None and longest < default:
        log.info("Windows are %d tokens long, as many as the model has positions for.", longest)
    if wanted is None:
        return min(default, longest)
    if wanted > longest:
        log.warning(
            "Windows of %d tokens are longer than the model was made for (%d), so what is measured on them "
            "says little about it.",
            *(wanted, longest),
        )
    return wanted
