"""The operators in plain torch, for every device. All other backends are tested against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from compress.kernels.codes.floating import real_scales
from compress.kernels.codes.minmax import fake_quantize
from compress.kernels.codes.packing import unpack
from compress.kernels.cpu.layout import STRIP, from_strips, groups_from_strips

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


def in_rows(packed: torch.Tensor, width: int) -> bool:
    """Whether a weight of so many columns lies in canonical rows, and not in strips."""
    if packed.dtype == torch.float8_e4m3fn:
        return packed.shape[-1] == width  # a strip has 16 times as many codes
    return packed.dtype == torch.int32


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    width: int,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """s · (q − z), or s · table[q], in float32 [out, width], from the canonical layout.

    Arguments as for `compress.kernels.ops.packed_linear`.
    """
    out, groups = scales.shape
    codes = unpack(packed, bits, width) if packed.dtype == torch.int32 else packed
    levels = _levels(codes, bits, None if zeros is None else zeros.unsqueeze(-1), table, (out, groups, -1))
    return levels.mul_(real_scales(scales, None).unsqueeze(-1)).view(out, width)


def dequantize_strips(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same from strips (see `compress.kernels.cpu.layout`): float32 [strips · 16, width]."""
    rows = packed.shape[0] * STRIP
    codes = from_strips(packed, bits, group_size, rows, width)
    size = width if group_size == -1 else group_size

    def spread(values: torch.Tensor) -> torch.Tensor:
        return groups_from_strips(values, rows).repeat_interleave(size, dim=1)[:, :width]

    zeros = None if zeros is None else spread(zeros)
    return _levels(codes, bits, zeros, table, codes.shape).mul_(spread(scales).float())


def _levels(
    codes: torch.Tensor,
    bits: int,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """What the codes stand for before they are scaled, as a new float32 tensor of the given shape."""
    if table is not None:
        return table[codes.int()].view(shape)
    levels = codes.to(torch.float32).view(shape)
    if codes.dtype != torch.uint8:
        return levels
    return levels.sub_(2 ** (bits - 1) if zeros is None else zeros.float())


def round_to_int8(input: torch.Tensor, activations: str, group_size: int) -> torch.Tensor:
    """Activations [..., in] rounded to int8, as float32.

    Args:
        activations: ``int8-block`` for the scale max|x| / 127 of each group, or ``int8-token`` for the scale
            (max|x| + 1e-6) / 127 of each row (see `compress.kernels.codes.minmax`).
        group_size: columns in a group; −1 for a whole row.
    """
    if activations == "int8-token":
        return fake_quantize(input.float(), 8)
    wide, width = input.float(), input.shape[-1]
    size = width if group_size == -1 else group_size
    groups = F.pad(wide, (0, -width % size)).unflatten(-1, (-1, size))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / torch.where(scales == 0, 1, scales)).round_()
    return (codes * scales).flatten(-2)[..., :width]


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
    width, rounded = input.shape[-1], input

    def dequantize_rows(rows: slice) -> torch.Tensor:
        some = None if zeros is None else zeros[rows]
        return dequantize(packed[rows], scales[rows], some, bits, width, table)

    def dequantize_some_strips(rows: slice) -> torch.Tensor:
        strips = slice(rows.start // STRIP, -(-rows.stop // STRIP))
        some = None if zeros is None else zeros[strips]
        weight = dequantize_strips(packed[strips], scales[strips], some, bits, group_size, width, table)
        return weight[: rows.stop - rows.start]

    if activations != "floating":
        rounded = round_to_int8(input, activations, group_size)
    in_strips = not in_rows(packed, width)
    get = dequantize_some_strips if in_strips else dequantize_rows
    return linear_by_rows(rounded, out_features, get, bias, STRIP if in_strips else 1).to(input.dtype)
