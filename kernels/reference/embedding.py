"""Rows of packed tables in plain torch (see `compress.kernels.embedding_ops`)."""

from __future__ import annotations

import torch

from compress.kernels.cpu.layout import STRIP
from compress.kernels.reference.ops import dequantize, dequantize_strips


def packed_embedding(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    width: int,
) -> torch.Tensor:
    """Arguments and result as `compress.kernels.embedding_ops.packed_embedding`."""
    numbers = rows.reshape(-1).long()
    if not len(numbers):
        return scales.new_empty((*rows.shape, width), dtype=torch.float32)
    in_strips = packed.dtype == torch.uint8
    at = numbers // STRIP if in_strips else numbers
    some = packed[at], scales[at], None if zeros is None else zeros[at]
    if not in_strips:
        return dequantize(*some, bits, width).view(*rows.shape, width)
    found = dequantize_strips(*some, bits, group_size, width).view(-1, STRIP, width)
    chosen = torch.arange(len(numbers), device=rows.device)
    return found[chosen, numbers % STRIP].view(*rows.shape, width)
