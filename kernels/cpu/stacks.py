"""The native description of weights in blocks, and the call that multiplies with them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_void_p

import torch

from compress.kernels.cpu.linear import ACTIVATIONS, FACTORS, MOST_BLOCKS, PLANES, TYPES, Linear

__all__ = ["MOST_BLOCKS", "MOST_PLANES", "Linear", "factors", "multiply", "planes"]

MOST_PLANES = 8


def planes(
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    width: int,
    activations: str,
    dtype: torch.dtype,
) -> Linear:
    """The description of nested codes. The tensors must be contiguous and outlive it, and are not checked.

    Args:
        signs, scales, bias, activations: as for `compress.kernels.stack_ops.plane_linear`.
        width: columns.
        dtype: of the inputs and results.
    """
    out, groups = scales.shape
    linear = _linear(PLANES, (out, width), bias, dtype)
    pointers = [signs[0].data_ptr(), signs[0].data_ptr() + out * -(-width // 8)]
    pointers += [block.data_ptr() for block in signs[1:]]
    linear.codes[: len(pointers)] = pointers
    linear.bits = linear.blocks = len(pointers)
    linear.group, linear.activations = -(-width // groups), ACTIVATIONS[activations]
    linear.scales, linear.scale_type = scales.data_ptr(), TYPES[scales.dtype]
    return linear


def factors(
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Linear:
    """The description of blocks of factors. The tensors must be contiguous and outlive it, and are not
    checked.

    Args:
        signs, left, right, bias: as for `compress.kernels.stack_ops.factor_linear`.
        dtype: of the inputs and results.
    """
    linear = _linear(FACTORS, (left[0].shape[0], right[0].shape[1]), bias, dtype)
    linear.blocks, linear.rank = len(signs), left[0].shape[1]
    for into, parts in ((linear.codes, signs), (linear.left, left), (linear.right, right)):
        into[: len(parts)] = [part.data_ptr() for part in parts]
    return linear


def _linear(kind: int, shape: tuple[int, int], bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    linear = Linear(kind=kind, rows=shape[0], columns=shape[1], group=shape[1], type=TYPES[dtype])
    if bias is not None:
        linear.bias, linear.bias_type = bias.data_ptr(), TYPES[bias.dtype]
    return linear


class _Known:
    """A description, and what it describes. It keeps no block in memory, because blocks may be dropped."""

    def __init__(self, tensors: Sequence[torch.Tensor | None], linear: Linear) -> None:
        self.tensors = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
        self.pointers = [_pointer(tensor) for tensor in tensors]
        self.linear, self.address = linear, ctypes.addressof(linear)

    def describes(self, tensors: Sequence[torch.Tensor | None], width: int) -> bool:
        return (
            len(tensors) == len(self.tensors)
            and width == self.linear.columns
            and all(
                tensor is (known if known is None else known())
                for tensor, known in zip(tensors, self.tensors, strict=True)
            )
            and self.pointers == [_pointer(tensor) for tensor in tensors]
        )


_KNOWN: dict[tuple[int, torch.dtype, str], _Known] = {}


def multiply(
    library: ctypes.CDLL,
    input: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    activations: str,
    describe: Callable[[], Linear],
) -> torch.Tensor:
    """x Ŵᵀ + bias by the native kernel: [..., in] -> [..., out].

    Describing a weight takes longer than a small product. So the last description of a stack is kept as long
    as its first block lives.

    Args:
        library: with the kernel.
        input: [..., in], of one of `TYPES`.
        tensors: all those that the description points to; the first one belongs to the first block.
        activations: how the input is rounded.
        describe: checks all arguments and describes the weight.
    """
    first = tensors[0]
    assert first is not None
    key = (id(first), input.dtype, activations)
    known = _KNOWN.get(key)
    if known is None or not known.describes(tensors, input.shape[-1]):
        linear = describe()
        if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
            raise ValueError("The blocks of a stack must be contiguous.")
        if known is None:
            weakref.finalize(first, _KNOWN.pop, key, None)
        known = _KNOWN[key] = _Known(tensors, linear)
    input = input.contiguous()
    output = input.new_empty((*input.shape[:-1], known.linear.rows))
    if rows := input.numel() // input.shape[-1]:
        function = library.compress_linear
        function.argtypes, function.restype = (c_void_p, c_void_p, c_void_p, c_int32), None
        function(known.address, input.data_ptr(), output.data_ptr(), rows)
    return output


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
