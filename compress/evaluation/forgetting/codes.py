"""Whether an edit of weights is still there once they are rounded: the share of low-bit codes that differ."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.engine.opening import open_checkpoint
from compress.report.forgetting import Codes
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.stacks import STACKS
from compress.storage.formats.table import Formats


def differing_codes(one: Path, other: Path) -> Codes | None:
    """Compare the codes of two models that were quantized in the same way.

    Codes are compared as they are; scales and zero points may differ too, which is not counted.

    Returns:
        None if they have no codes that can be compared: they are not quantized, or in stacks of blocks.

    Raises:
        BadInput: a folder cannot be read.
    """
    first, second = open_checkpoint(one), open_checkpoint(other)
    names = set(_packed(first)) & set(_packed(second))
    weights = differ = 0
    for name in sorted(names):
        ours, theirs = _codes(first, name), _codes(second, name)
        if ours.shape == theirs.shape:
            weights += ours.numel()
            differ += int((ours != theirs).sum())
    return Codes(weights=weights, differ=differ) if weights else None


def _packed(checkpoint: Checkpoint) -> list[str]:
    """The names of the linears that have codes."""
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None or quantization.get("quant_method") in STACKS:
        return []
    ending = f".{Formats(quantization).marker}"
    return [name.removesuffix(ending) for name in checkpoint.tensors if name.endswith(ending)]


def _codes(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    form = Formats(checkpoint.config["quantization_config"]).of(name)
    return form.read(name, checkpoint.read).codes
