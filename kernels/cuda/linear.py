"""Products with canonical rows of packed weights on a CUDA device.

These are the calls of ``source/linear.cu``, for integer codes, and of ``source/formats.cu``, for codes that
stand for the numbers of a table (NF4, MXFP4, NVFP4) or are numbers themselves (E4M3).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int32, c_void_p

import torch

from compress.kernels.reference.ops import round_to_int8

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes that the kernels read and write, and their numbers there."""

SCALES = {**TYPES, torch.uint8: 3, torch.float8_e4m3fn: 4}
"""The dtypes of scales, those included that are stored as exponents (E8M0)."""

CHUNK, SHORTEST = 32, 16
"""Codes that share a scale, at least: of integers and of E4M3, and with a table."""

FEW = 8
"""Up to so many rows of an input, a block of threads takes 16 rows of the weight, and above, 64."""

COLUMNS = 128
"""Columns that a warp takes at a time."""

WANTED = 512
"""Blocks of threads that are to be had, by sharing columns: a few for each multiprocessor of a large GPU."""

MOST_SPLITS = 8

MOST_ROWS = 65535 * 64
"""The most rows of an input that a launch takes."""


class Weight(ctypes.Structure):
    """``Weight`` of source/numbers.cuh, which says what the fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("packed", "scales", "zeros", "table")),
        *((name, c_int32) for name in ("out", "width", "words", "groups", "group_size", "bits", "type")),
    ]


def can_read(
    packed: torch.Tensor, scales: torch.Tensor, group_size: int, width: int, table: torch.Tensor | None = None
) -> bool:
    """Whether the kernels read a weight: canonical rows, and a scale for whole chunks of columns."""
    rows = packed.dtype == torch.int32 or (packed.dtype == torch.float8_e4m3fn and packed.shape[1] == width)
    words = packed.dtype == torch.int32 or width % 4 == 0
    chunk = CHUNK if table is None else SHORTEST
    chunks = group_size == -1 or group_size >= width or group_size % chunk == 0
    return rows and words and scales.dtype in SCALES and chunks and 0 < width < 2**31 - 128


def can_multiply(input: torch.Tensor) -> bool:
    """Whether the kernel takes an input."""
    rows = input.numel() // max(1, input.shape[-1])
    return input.dtype in (torch.float16, torch.bfloat16) and 0 < rows <= MOST_ROWS


def splits_of(rows: int, out: int, width: int) -> int:
    """Blocks of threads that share the columns of a weight [out, width].

    Each of them has at least two steps of eight warps where the input has few rows, and else four steps.
    """
    tile_out, tile_rows, step = (16, FEW, 8 * COLUMNS) if rows <= FEW else (64, 64, 2 * COLUMNS)
    blocks = -(-out // tile_out) * -(-rows // tile_rows)
    return max(1, min(width // (2 * step), WANTED // blocks, MOST_SPLITS))


def weight_of(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
) -> Weight:
    """The description of a weight, whose tensors are contiguous and outlive it.

    Args:
        packed, scales, zeros, table, bits, group_size: as for `compress.kernels.ops.packed_linear`.
        width: columns.
    """
    return Weight(
        packed=packed.data_ptr(),
        scales=scales.data_ptr(),
        zeros=None if zeros is None else zeros.data_ptr(),
        table=None if table is None else table.data_ptr(),
        out=packed.shape[0],
        width=width,
        words=packed.shape[1] * packed.element_size() // 4,
        groups=scales.shape[1],
        group_size=width if group_size == -1 else group_size,
        bits=bits,
        type=SCALES[scales.dtype],
    )


def multiply(
    library: ctypes.CDLL,
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
    stream: int | None,
) -> tuple[torch.Tensor, int]:
    """Start `compress.kernels.ops.packed_linear`, whose checked arguments these are.

    Args:
        library: of source/linear.cu and source/formats.cu.
        input, ..., activations: see there; `can_read` and `can_multiply` hold.
        stream: that the kernel runs in, as a number.

    Returns:
        The product in the dtype of ``input``, and the error of the launch; 0 is none.
    """
    width = input.shape[-1]
    if activations != "floating":
        input = round_to_int8(input, activations, group_size).to(input.dtype)
    input, packed, scales = input.contiguous(), packed.contiguous(), scales.contiguous()
    zeros, table, bias = (None if tensor is None else tensor.contiguous() for tensor in (zeros, table, bias))
    rows, output = input.numel() // width, input.new_empty((*input.shape[:-1], out_features))
    splits = splits_of(rows, out_features, width)
    parts = input.new_empty((splits, rows, out_features), dtype=torch.float32) if splits > 1 else None
    weight = weight_of(packed, scales, zeros, table, bits, group_size, width)
    formats = table is not None or packed.dtype == torch.float8_e4m3fn
    function = library.compress_cuda_format_linear if formats else library.compress_cuda_packed_linear
    function.argtypes, function.restype = (*[c_void_p] * 4, *[c_int] * 3, c_void_p, c_int, c_void_p), c_int
    error = function(
        ctypes.addressof(weight),
        input.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        rows,
        TYPES[input.dtype],
        0 if bias is None else TYPES[bias.dtype],
        None if parts is None else parts.data_ptr(),
        splits,
        stream,
    )
    return output, error


def embed(
    library: ctypes.CDLL,
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    stream: int | None,
) -> tuple[torch.Tensor, int]:
    """Start `compress.kernels.embedding_ops.packed_embedding`, whose checked arguments these are.

    Args:
        library: of source/linear.cu.
        rows, ..., width: see there; `can_read` holds, and there are from 1 to 2^31 − 1 rows.
        stream: that the kernel runs in, as a number.

    Returns:
        float32 [..., width], and the error of the launch; 0 is none.
    """
    numbers = rows.to(torch.int64).contiguous()
    packed, scales = packed.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    output = torch.empty((*rows.shape, width), dtype=torch.float32, device=packed.device)
    weight = weight_of(packed, scales, zeros, None, bits, group_size, width)
    function = library.compress_cuda_packed_embedding
    function.argtypes, function.restype = (c_void_p, c_void_p, c_int, c_void_p, c_void_p), c_int
    error = function(ctypes.addressof(weight), numbers.data_ptr(), numbers.numel(), output.data_ptr(), stream)
    return output, error
