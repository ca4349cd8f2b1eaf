"""The operators on native kernels. Their arguments have been checked by `compress.kernels.ops`."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from compress.kernels.cpu.library import library
from compress.kernels.cpu.linear import ACTIVATIONS, FP8, INTEGER, TABLE, TYPES, Linear


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether the kernels take inputs of this dtype."""
    return dtype in TYPES


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
    """Arguments and result as `compress.kernels.ops.packed_linear`, with the codes in strips."""
    native = library()
    assert native is not None
    input = input.contiguous()
    width = input.shape[-1]
    result = input.new_empty((*input.shape[:-1], out_features))
    bias = None if bias is None else bias.float()
    kind = FP8 if packed.dtype == torch.float8_e4m3fn else INTEGER if table is None else TABLE
    linear = describe(
        *(kind, out_features, width, bits, group_size, scales.dtype, activations, input.dtype),
        *(packed.data_ptr(), scales.data_ptr(), _address(zeros), _address(table), _address(bias)),
    )
    if result.numel():
        native.compress_linear(linear, input.data_ptr(), result.data_ptr(), input.numel() // width)
    return result


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# Every linear is described again at every token otherwise, which takes longer than a small product.
@lru_cache(maxsize=4096)
def describe(
    kind: int,
    out_features: int,
    width: int,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    activations: str,
    dtype: torch.dtype,
    packed: int,
    scales: int,
    zeros: int | None,
    table: int | None,
    bias: int | None,
) -> ctypes.Array[Linear]:
    """What the kernels want to know of a linear; ``packed`` and the rest are addresses."""
    linear = Linear(
        kind=kind,
        rows=out_features,
        columns=width,
        bits=bits,
        group=width if group_size == -1 else group_size,
        scale_type=TYPES[scale_dtype],
        activations=ACTIVATIONS[activations],
        type=TYPES[dtype],
        blocks=1,
        codes=(packed,),
        scales=scales,
        zeros=zeros,
        table=table,
        bias=bias,
    )
    return (Linear * 1)(linear)
