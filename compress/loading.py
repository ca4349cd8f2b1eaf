"""``compress.load``: any model folder as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from compress.checkpoint import DTYPE_NAMES, Checkpoint
from compress.errors import BadInput
from compress.modeling import Weights, config_of, skeleton


def load(path: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Load a model folder, quantized or not, ready for ``generate``.

    Packed linears stay packed and run through the kernels of this package; no dequantized copy is kept.

    Args:
        path: a folder written by compress-model, or any Hugging Face folder of a supported architecture.
        device: such as "cpu" or "cuda:0".
        dtype: of activations and of the weights that are not packed; None takes the one in config.json.

    Returns:
        The transformers model in evaluation mode; ``config`` has no quantization section.

    Raises:
        BadInput: not a model folder, damaged files, or an architecture the anatomy table does not know.
    """
    checkpoint = Checkpoint.open(path)
    model = assemble(checkpoint, device, dtype)
    model.config._name_or_path = model.name_or_path = str(path)
    if (Path(path) / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def assemble(
    checkpoint: Checkpoint, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """The whole model of an open checkpoint in memory; arguments, result and errors as `load`."""
    config = config_of(checkpoint)
    dtype = _dtype(dtype or config.dtype or torch.float32)  # before the skeleton, which sets its own
    model = skeleton(config, device)
    weights = Weights(checkpoint, model, device, dtype)
    weights.fill(model, "")
    model.config.dtype = weights.dtype
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPE_NAMES or not found.is_floating_point:
        raise BadInput(f"'{dtype}' is not a floating-point dtype; use float32, bfloat16 or float16.")
    return found
