"""``torch.ops.compress.packed_embedding``: some rows of a packed table, dequantized."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from compress.kernels.cpu.library import library
from compress.kernels.cpu.linear import strips_linear
from compress.kernels.cuda import library as cuda
from compress.kernels.cuda import linear as cuda_linear
from compress.kernels.ops import LIBRARY, check_packed_linear
from compress.kernels.reference import embedding as reference
from compress.kernels.triton import library as triton
from compress.kernels.triton import linear as triton_linear

LIBRARY.define(
    "packed_embedding(Tensor rows, Tensor packed, Tensor scales, Tensor? zeros, int bits, int group_size, "
    "int out_features, int width) -> Tensor"
)


def check_packed_embedding(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    width: int,
) -> None:
    """Make sure that the arguments of `packed_embedding` fit together.

    Raises:
        ValueError: they do not.
    """
    if rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"The numbers of rows are {rows.dtype}, not whole numbers of 32 or 64 bits.")
    like = scales.new_empty((0, width), dtype=torch.float32)
    check_packed_linear(like, packed, scales, zeros, None, None, bits, group_size, out_features, "floating")


@torch.library.register_fake("compress::packed_embedding", lib=LIBRARY)
def _packed_embedding_shape(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    width: int,
) -> torch.Tensor:
    check_packed_embedding(rows, packed, scales, zeros, bits, group_size, out_features, width)
    return scales.new_empty((*rows.shape, width), dtype=torch.float32)


def _packed_embedding_cpu(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    width: int,
) -> torch.Tensor:
    check_packed_embedding(rows, packed, scales, zeros, bits, group_size, out_features, width)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < out_features:
        raise IndexError(f"A table of {out_features} rows was asked for others.")
    native = library() if packed.dtype == torch.uint8 else None
    if native is None:
        return reference.packed_embedding(rows, packed, scales, zeros, bits, group_size, out_features, width)
    packed, scales = packed.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    linear = strips_linear(
        packed,
        scales,
        zeros,
        table=None,
        bias=None,
        bits=bits,
        group_size=group_size,
        shape=(out_features, width),
        activations="floating",
        dtype=torch.float32,
    )
    numbers = rows.to(torch.int64).contiguous()
    found = torch.empty((*rows.shape, width), dtype=torch.float32)
    function = native.compress_rows
    function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, c_void_p), None
    function(ctypes.addressof(linear), numbers.data_ptr(), numbers.numel(), found.data_ptr())
    return found


def _packed_embedding_cuda(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    width: int,
) -> torch.Tensor:
    check_packed_embedding(rows, packed, scales, zeros, bits, group_size, out_features, width)
    if 0 < rows.numel() < 2**31 and cuda_linear.can_read(packed, scales, group_size, width):
        # A negative number, or one past the end, is refused by torch on the device, as in an embedding.
        torch._assert_async(((rows >= 0) & (rows < out_features)).all())
        found = cuda.start(
            (rows, packed, scales, zeros),
            lambda native, stream: cuda_linear.embed(
                native, rows, packed, scales, zeros, bits, group_size, width, stream
            ),
        )
        if found is not None:
            return found
        rest = rows, packed, scales, zeros, bits, group_size, width
        found = triton.start(packed.device, lambda: triton_linear.embed(*rest))
        if found is not None:
            return found
    return reference.packed_embedding(rows, packed, scales, zeros, bits, group_size, out_features, width)


LIBRARY.impl("packed_embedding", reference.packed_embedding, "CompositeExplicitAutograd")
LIBRARY.impl("packed_embedding", _packed_embedding_cpu, "CPU")
LIBRARY.impl("packed_embedding", _packed_embedding_cuda, "CUDA")


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
    """Some rows of a packed table of integer codes.

    Args:
        rows: their numbers, int64 or int32 [...].
        packed, scales, zeros, bits, group_size, out_features: as for `compress.kernels.ops.packed_linear`.
        width: columns of the table.

    Returns:
        float32 [..., width].

    Raises:
        ValueError: the arguments do not fit together.
        IndexError: there is no such row (on the CPU).
    """
    return torch.ops.compress.packed_embedding(
        rows, packed, scales, zeros, bits, group_size, out_features, width
    )
