"""Products with weights in blocks on a CUDA device: the calls of ``source/stacks.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int32, c_void_p

import torch

from compress.kernels.cuda.linear import CHUNK, TYPES
from compress.kernels.reference.ops import round_to_int8

MOST_PLANES, MOST_BLOCKS = 8, 128


class Planes(ctypes.Structure):
    """``Planes`` of source/stacks.cu, which says what the fields mean."""

    _fields_ = [
        ("signs", c_void_p * MOST_PLANES),
        ("scales", c_void_p),
        *((name, c_int32) for name in ("out", "width", "pitch", "groups", "group_size", "count")),
    ]


class Factors(ctypes.Structure):
    """``Factors`` of source/stacks.cu, which says what the fields mean."""

    _fields_ = [
        *((name, c_void_p * MOST_BLOCKS) for name in ("signs", "left", "right")),
        *((name, c_int32) for name in ("out", "width", "pitch", "rank", "count")),
    ]


def can_read_planes(signs: Sequence[torch.Tensor], scales: torch.Tensor, width: int) -> bool:
    """Whether the kernel reads nested codes: each scale belongs to whole chunks of columns."""
    groups = scales.shape[1]
    chunks = groups == 1 or -(-width // groups) % CHUNK == 0
    return len(signs) < MOST_PLANES and chunks and 0 < width < 2**31 - 128 and len(scales) > 0


def can_read_factors(signs: Sequence[torch.Tensor], width: int) -> bool:
    """Whether the kernel reads blocks of factors."""
    return len(signs) <= MOST_BLOCKS and 0 < width < 2**31 - 128 and len(signs[0]) > 0


def multiply_planes(
    library: ctypes.CDLL,
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
    stream: int | None,
) -> tuple[torch.Tensor, int]:
    """Start `compress.kernels.stack_ops.plane_linear`, whose checked arguments these are.

    Args:
        library: of source/stacks.cu.
        input, ..., activations: see there; `can_read_planes` and `can_multiply` hold.
        stream: that the kernel runs in, as a number.

    Returns:
        The product in the dtype of ``input``, and the error of the launch; 0 is none.
    """
    width, (out, groups) = input.shape[-1], scales.shape
    group = -(-width // groups)
    if activations != "floating":
        input = round_to_int8(input, activations, group).to(input.dtype)
    scales, signs = scales.contiguous(), [block.contiguous() for block in signs]
    pitch = -(-width // 8)
    first = signs[0].data_ptr()
    pointers = [first, first + out * pitch, *(block.data_ptr() for block in signs[1:])]
    weight = Planes(
        signs=(c_void_p * MOST_PLANES)(*pointers),
        scales=scales.data_ptr(),
        out=out,
        width=width,
        pitch=pitch,
        groups=groups,
        group_size=group,
        count=len(pointers),
    )
    return _start(library.compress_cuda_plane_linear, weight, input, bias, out, stream)


def multiply_factors(
    library: ctypes.CDLL,
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    stream: int | None,
) -> tuple[torch.Tensor, int]:
    """Start `compress.kernels.stack_ops.factor_linear`, whose checked arguments these are.

    Args:
        library: of source/stacks.cu.
        input, ..., bias: see there; `can_read_factors` and `can_multiply` hold.
        stream: that the kernel runs in, as a number.

    Returns:
        The product in the dtype of ``input``, and the error of the launch; 0 is none.
    """
    parts = {
        name: [block.contiguous() for block in blocks]
        for name, blocks in (("signs", signs), ("left", left), ("right", right))
    }
    (out, rank), width = left[0].shape, input.shape[-1]
    weight = Factors(
        out=out,
        width=width,
        pitch=-(-width // 8),
        rank=rank,
        count=len(signs),
        **{
            name: (c_void_p * MOST_BLOCKS)(*(block.data_ptr() for block in blocks))
            for name, blocks in parts.items()
        },
    )
    return _start(library.compress_cuda_factor_linear, weight, input, bias, out, stream)


def _start(
    function: ctypes._NamedFuncPointer,
    weight: ctypes.Structure,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    out: int,
    stream: int | None,
) -> tuple[torch.Tensor, int]:
    input, bias = input.contiguous(), None if bias is None else bias.contiguous()
    output = input.new_empty((*input.shape[:-1], out))
    function.argtypes, function.restype = (*[c_void_p] * 4, *[c_int] * 3, c_void_p), c_int
    error = function(
        ctypes.addressof(weight),
        input.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        input.numel() // input.shape[-1],
        TYPES[input.dtype],
        0 if bias is None else TYPES[bias.dtype],
        stream,
    )
    return output, error
