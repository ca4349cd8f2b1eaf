"""The products with stacks in plain torch, for every device (see `compress.kernels.stack_ops`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.kernels.codes.packing import unpack_signs
from compress.kernels.reference.ops import linear_by_rows, round_to_int8


def dequantize_planes(
    signs: Sequence[torch.Tensor], scales: torch.Tensor, width: int, start: int = 0
) -> torch.Tensor:
    """s ⊙ Σ_j 2^-j S_j over some consecutive blocks: float32 [rows, width].

    Args:
        signs: of each block, uint8 [rows, ceil(width/8)]; of the first of all [2, rows, ceil(width/8)].
        scales: [rows, groups].
        width: columns.
        start: the number of the first of these blocks.
    """
    unit = spread(scales.float(), width)
    total = torch.zeros_like(unit)
    for index, packed in enumerate(signs, start):
        if index == 0:
            major, minor = unpack_signs(packed, width)
            total.add_(major).add_(minor, alpha=0.5)
        else:
            total.add_(unpack_signs(packed, width), alpha=2.0 ** -(index + 1))
    return total.mul_(unit)


def dequantize_factors(
    signs: Sequence[torch.Tensor], left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Σ_i S_i ⊙ (a_i b_i): float32 [rows, width].

    Args:
        signs: of each block, uint8 [rows, ceil(width/8)].
        left: of each block, [rows, k].
        right: of each block, [k, width].
    """
    total: torch.Tensor | None = None
    for packed, a, b in zip(signs, left, right, strict=True):
        product = (a.float() @ b.float()).mul_(unpack_signs(packed, b.shape[1]))
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def plane_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    """Arguments and result as `compress.kernels.stack_ops.plane_linear`."""
    width, out = input.shape[-1], len(scales)

    def dequantize_rows(rows: slice) -> torch.Tensor:
        return dequantize_planes([block[..., rows, :] for block in signs], scales[rows], width)

    rounded = input
    if activations != "floating":
        group = -(-width // scales.shape[1])
        rounded = round_to_int8(input, activations, group)
    return linear_by_rows(rounded, out, dequantize_rows, bias).to(input.dtype)


def factor_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as `compress.kernels.stack_ops.factor_linear`."""

    def dequantize_rows(rows: slice) -> torch.Tensor:
        return dequantize_factors([block[rows] for block in signs], [block[rows] for block in left], right)

    return linear_by_rows(input, len(left[0]), dequantize_rows, bias)


def spread(scales: torch.Tensor, width: int) -> torch.Tensor:
    """The scale of each weight [out, width] from those of the groups [out, groups].

    All groups but the last are ceil(width / groups) wide.
    """
    return scales.repeat_interleave(-(-width // scales.shape[1]), 1)[:, :width]
