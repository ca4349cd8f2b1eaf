"""The operators in plain torch, for every device. All other backends are tested against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from compress.kernels.codes.packing import unpack
from compress.kernels.cpu.layout import STRIP, groups_from_strips, rows_from_strips

WEIGHTS_AT_ONCE = 1 << 18
"""Weights that are dequantized at once on a CPU: 1 MiB in float32, which stays in its second-level cache."""


def row_slices(out: int, width: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Cut a weight [out, width] into rows that are dequantized together: a few on a CPU, else all.

    Args:
        out, width: the shape of the weight.
        device: where it is dequantized.
        multiple: every slice but the last has a multiple of so many rows.
    """
    step = max(multiple, WEIGHTS_AT_ONCE // width // multiple * multiple) if device.type == "cpu" else out
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def linear_by_rows(
    input: torch.Tensor,
    out: int,
    dequantize_rows: Callable[[slice], torch.Tensor],
    bias: torch.Tensor | None,
    multiple: int = 1,
) -> torch.Tensor:
    """x Ŵᵀ + bias without a dense copy of Ŵ: a few rows of it are dequantized and multiplied at once.

    The dequantized rows are rounded to the dtype of ``input``, which is what stock loaders compute with.

    Args:
        input: [..., in], floating point.
        out: rows of the weight.
        dequantize_rows: gives some rows of the weight, float32 [rows, in].
        bias: [out], or None.
        multiple: as in `row_slices`.

    Returns:
        [..., out] in the dtype of ``input``.
    """
    result = input.new_empty((*input.shape[:-1], out))
    for rows in row_slices(out, input.shape[-1], input.device, multiple):
        weight = dequantize_rows(rows).to(input.dtype)
        result[..., rows] = F.linear(input, weight, None if bias is None else bias[rows].to(input.dtype))
    return result


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
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activations: str,
) -> torch.Tensor:
    """Arguments and result as `compress.kernels.ops.packed_linear`."""
    width = input.shape[-1]

    def dequantize_rows(rows: slice) -> torch.Tensor:
        if packed.dtype == torch.int32:
            codes = unpack(packed[rows], bits, width)
            per_group = [None if tensor is None else tensor[rows] for tensor in (zeros, scales)]
        else:
            codes = rows_from_strips(packed, bits, group_size, width, rows)
            strips = slice(rows.start // STRIP, -(-rows.stop // STRIP))
            per_group = [
                None if tensor is None else groups_from_strips(tensor[strips], len(codes))
                for tensor in (zeros, scales)
            ]
        numbers = numbers_of(codes, per_group[0], table, bits, group_size)
        return numbers * spread(per_group[1], width, group_size)

    rounded = round_inputs(input, activations, group_size)
    return linear_by_rows(rounded, out_features, dequantize_rows, bias, STRIP)


def numbers_of(
    codes: torch.Tensor, zeros: torch.Tensor | None, table: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    """What codes [rows, in] stand for without their scale: float32 [rows, in]."""
    if table is not None:
        return table[codes.int()]
    if codes.is_floating_point():
        return codes.float()
    offset = 2 ** (bits - 1) if zeros is None else spread(zeros, codes.shape[1], group_size)
    return codes.float() - offset


def spread(per_group: torch.Tensor, width: int, group_size: int) -> torch.Tensor:
    """What each column has of the values of groups [rows, groups]: float32 [rows, width]."""
    group_size = width if group_size == -1 else group_size
    return per_group.float().repeat_interleave(group_size, 1)[:, :width]


def round_inputs(input: torch.Tensor, activations: str, group_size: int) -> torch.Tensor:
    """Round inputs [..., in] to int8 with a scale max|x| / 127 for each group or each token, if asked for."""
    if activations == "floating":
        return input
    width = input.shape[-1]
    group = width if activations == "int8-token" or group_size == -1 else group_size
    grouped = F.pad(input.float(), (0, -width % group)).unflatten(-1, (-1, group))
    scales = grouped.abs().amax(-1, keepdim=True) / 127
    rounded = (grouped / torch.where(scales == 0, 1, scales)).round() * scales
    return rounded.flatten(-2)[..., :width].to(input.dtype)
