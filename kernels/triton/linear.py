"""Products with canonical rows of packed weights, and rows of packed tables, by Triton programs.

All kinds of codes take one path: integers minus their zero points, or numbers of a table (NF4, MXFP4, NVFP4,
E4M3). With few rows, several programs share the columns of a row; their sums are added in a fixed order, so
that results repeat.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from compress.kernels.codes.floating import real_scales
from compress.kernels.reference.ops import round_to_int8

TILE_OUT = 32
"""Rows of the weight in a tile."""

PROGRAMS = 512
"""Columns are split until there are about so many: a few for each multiprocessor of a large GPU."""

LOOKED_UP = 256
"""Columns of a row of a table that a program dequantizes."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
"""How Triton compiles the product."""


def rows_of_tile(rows: int) -> int:
    """Rows of the input in a tile: the tensor cores take 16 at least."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def columns_of_tile(group_size: int, width: int) -> int:
    """Columns in a tile: the most of 64, 32 and 16 that a group is a multiple of."""
    if group_size == -1 or group_size >= width:
        return 64
    return next(columns for columns in (64, 32, 16) if group_size % columns == 0)


def multiply(
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
    """`compress.kernels.ops.packed_linear`, whose checked arguments these are.

    `compress.kernels.cuda.linear.can_read` and `can_multiply` hold.
    """
    from compress.kernels.triton import programs

    width = input.shape[-1]
    if activations != "floating":
        input = round_to_int8(input, activations, group_size).to(input.dtype)
    input, scales = input.contiguous(), scales.contiguous()
    rows, groups = input.numel() // width, scales.shape[1]
    if packed.dtype == torch.float8_e4m3fn:
        table = numbers_of_bytes(torch.float8_e4m3fn, packed.device)
        packed = packed.contiguous().view(torch.int32)
    tile_rows, columns = rows_of_tile(rows), columns_of_tile(group_size, width)
    all_tiles = -(-width // columns)
    grid = -(-out_features // TILE_OUT), -(-rows // tile_rows)
    tiles = -(-all_tiles // max(1, min(all_tiles, PROGRAMS // (grid[0] * grid[1]))))
    splits = -(-all_tiles // tiles)
    exact = splits > 1 or bias is not None  # something is still added
    dtype = torch.float32 if exact else input.dtype
    output = torch.empty((splits, rows, out_features), dtype=dtype, device=input.device)
    programs.linear[(*grid, splits)](
        input,
        packed.contiguous(),
        *stored(scales),
        None if zeros is None else zeros.contiguous(),
        None if table is None else table.contiguous(),
        output,
        rows,
        out_features,
        width,
        packed.shape[1],
        groups,
        width if group_size == -1 else group_size,
        tiles,
        bits,
        tile_rows,
        TILE_OUT,
        columns,
        **OPTIONS,
    )
    found = output[0] if splits == 1 else output.sum(0)
    if bias is not None:
        found += bias.float()
    return found.to(input.dtype).view(*input.shape[:-1], out_features)


def embed(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
) -> torch.Tensor:
    """`compress.kernels.embedding_ops.packed_embedding`, whose checked arguments these are.

    `compress.kernels.cuda.linear.can_read` holds, and there are rows.
    """
    from compress.kernels.triton import programs

    output = torch.empty((*rows.shape, width), dtype=torch.float32, device=packed.device)
    grid = rows.numel(), -(-width // LOOKED_UP)  # the first may be larger than 65,535
    programs.embedding[grid](
        rows.to(torch.int64).contiguous(),
        packed.contiguous(),
        *stored(scales.contiguous()),
        None if zeros is None else zeros.contiguous(),
        output,
        width,
        packed.shape[1],
        scales.shape[1],
        width if group_size == -1 else group_size,
        bits,
        LOOKED_UP,
    )
    return output


def stored(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales as programs read them: numbers, or bytes and the float32 number of each byte."""
    if scales.dtype.itemsize > 1:
        return scales, None
    return scales.view(torch.uint8), numbers_of_bytes(scales.dtype, scales.device)


@cache
def numbers_of_bytes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each of the 256 bytes stands for as a scale or code of a dtype: float32 [256]."""
    return real_scales(torch.arange(256, dtype=torch.uint8).view(dtype), None).to(device)
