"""The operators in plain torch, for every device: what all other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress.kernels.codes.packing import unpack

BLOCK = 1 << 18
"""Weights dequantized at a time: 1 MiB in float32, which stays in a CPU's second-level cache."""


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, width: int
) -> torch.Tensor:
    """s · (q − z) in float32 [out, width], from the canonical layout (see `compress.kernels.ops`)."""
    out, groups = scales.shape
    levels = unpack(packed, bits, width).to(torch.float32).view(out, groups, -1)
    levels.sub_(2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1))
    return levels.mul_(scales.float().unsqueeze(-1)).view(out, width)


def packed_linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Dequantize in float32, round to the dtype of ``input``, multiply: what stock loaders compute.

    A few output rows are dequantized at a time, so there is never a dense copy of the weight.
    """
    width, out = input.shape[-1], packed.shape[0]
    rows = max(1, BLOCK // width) if input.device.type == "cpu" else out
    result = input.new_empty((*input.shape[:-1], out))
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        weight = dequantize(packed[part], scales[part], None if zeros is None else zeros[part], bits, width)
        result[..., part] = F.linear(input, weight.to(input.dtype), None if bias is None else bias[part])
    return result
