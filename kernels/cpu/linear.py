"""The native description of a linear layer, and the call that multiplies with it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import c_int32, c_void_p
from functools import cache
from typing import Any

import torch

MOST_BLOCKS = 32

INTEGER, TABLE, FP8, DENSE, PLANES, FACTORS = range(6)
"""Kinds of weights."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of activations and scales."""

ACTIVATIONS = {"floating": 0, "int8-block": 1, "int8-token": 2}
"""How activations are rounded before they are multiplied."""


class Linear(ctypes.Structure):
    """``Linear`` of source/product.h, which says what the fields mean."""

    _fields_ = [
        ("kind", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("scale_type", c_int32),
        ("activations", c_int32),
        ("type", c_int32),
        ("blocks", c_int32),
        ("rank", c_int32),
        ("codes", c_void_p * MOST_BLOCKS),
        ("left", c_void_p * MOST_BLOCKS),
        ("right", c_void_p * MOST_BLOCKS),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("table", c_void_p),
        ("bias", c_void_p),
        ("bias_type", c_int32),
    ]


def strips_linear(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
    activations: str,
    dtype: torch.dtype,
) -> Linear:
    """The description of a weight in strips. The tensors must outlive it, and are not checked.

    Args:
        packed, scales, zeros, table, bias, bits, group_size, activations: as for
            `compress.kernels.ops.packed_linear`.
        shape: (out, in).
        dtype: of the inputs and results.
    """
    e4m3 = packed.dtype == torch.float8_e4m3fn
    linear = Linear(
        kind=FP8 if e4m3 else INTEGER if table is None else TABLE,
        rows=shape[0],
        columns=shape[1],
        bits=bits,
        group=shape[1] if group_size == -1 else min(group_size, shape[1]),
        scale_type=TYPES[scales.dtype],
        activations=ACTIVATIONS[activations],
        type=TYPES[dtype],
        blocks=1,
        scales=scales.data_ptr(),
        zeros=_pointer(zeros),
        table=_pointer(table),
        bias=_pointer(bias),
        bias_type=0 if bias is None else TYPES[bias.dtype],
    )
    linear.codes[0] = packed.data_ptr()
    return linear


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Product:
    """x Wᵀ + bias by the native kernel, for one weight in strips.

    Arguments as for `compress.kernels.ops.packed_linear`. They must have been checked, and their memory must
    outlive the product.
    """

    def __init__(
        self,
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
    ) -> None:
        shape = (out_features, input.shape[-1])
        self.linear = strips_linear(
            packed, scales, zeros, table, bias, bits, group_size, shape, activations, input.dtype
        )
        self.address, (self.rows, self.columns) = ctypes.addressof(self.linear), shape

    def __call__(self, input: torch.Tensor, library: ctypes.CDLL) -> torch.Tensor:
        """[..., in] -> [..., out], of the dtype that the product was made for."""
        input = input.contiguous()
        output = input.new_empty((*input.shape[:-1], self.rows))
        rows = input.numel() // self.columns
        if rows:
            _multiply(library)(self.address, input.data_ptr(), output.data_ptr(), rows)
        return output


@cache
def _multiply(library: ctypes.CDLL) -> Callable[[int, int, int, int], None]:
    function = library.compress_linear
    function.argtypes, function.restype = (c_void_p, c_void_p, c_void_p, c_int32), None
    return function


_PRODUCTS: dict[tuple[object, ...], tuple[Product, object]] = {}


def product_of(check: Callable[..., None], input: torch.Tensor, packed: torch.Tensor, *rest: Any) -> Product:
    """The product for these arguments of `compress.kernels.ops.packed_linear`, made once.

    Checking and describing a weight takes longer than a small product. So what was made for the very same
    tensors is taken again, as long as the packed one lives.

    Args:
        check: raises ValueError if the arguments, which it is called with, do not fit together.
    """
    tensors, settings = (packed, *rest[:4]), rest[4:]
    key = (*map(id, tensors), *map(_pointer, tensors), settings, input.dtype, input.shape[-1])
    if found := _PRODUCTS.get(key):
        return found[0]
    check(input, packed, *rest)
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("A weight in strips, its scales and its bias must be contiguous.")
    product = Product(input, packed, *rest)
    # No other tensor can get one of these ids: the entry goes with the packed tensor, and holds the others.
    _PRODUCTS[key] = product, (rest[:4], weakref.ref(packed, lambda _: _PRODUCTS.pop(key)))
    return product
