"""A linear layer whose weight stays in NF4."""

from __future__ import annotations

import torch

from compress.kernels.codes.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    NF4Weight,
    pack_high_first,
    unpack_high_first,
)
from compress.kernels.codes.packing import pack, unpack
from compress.kernels.cpu.layout import (
    groups_from_strips,
    groups_to_strips,
    rows_from_strips,
    to_strips,
)
from compress.kernels.layers.base import CodedLinear, as_bytes, check_same
from compress.kernels.ops import packed_linear

BITS = 4
"""Bits of a code."""

NESTED = ("nested_absmax", "nested_levels", "nested_mean")
"""Buffers that say how scales are decoded which are quantized themselves."""


class NF4Linear(CodedLinear):
    """``nn.Linear`` over an NF4 weight of bitsandbytes, for inference.

    Scales and levels are float32 numbers held as bytes, so that casting the module to another dtype leaves
    them as they are. Scales that are quantized themselves stay so.
    """

    codes: torch.Tensor
    absmax: torch.Tensor | None
    levels: torch.Tensor
    kernel_scales: torch.Tensor | None
    table: torch.Tensor | None

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        for name in ("codes", "absmax", "levels", "kernel_scales", "table", *NESTED):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight)

    def fill(self, weight: NF4Weight) -> None:
        check_same(self, weight, 0, weight.first)
        self.dtype = weight.dtype
        self.codes = pack_high_first(weight.codes)
        self.absmax, self.levels = as_bytes(weight.absmax), as_bytes(weight.levels)
        for name, tensor in zip(NESTED, weight.nested or (None, None, None), strict=True):
            setattr(self, name, None if tensor is None else as_bytes(tensor))
        self.kernel_scales, self.table, self.in_strips, self.in_rows = None, None, False, False

    def to_strips(self) -> bool:
        if self.in_features % BLOCK_SIZE:  # then a block lies in two rows
            return False
        weight = self.quantized()
        self.codes = to_strips(weight.codes, BITS, BLOCK_SIZE)
        self._take_scales(weight, groups_to_strips(weight.scales.view(self.out_features, -1)))
        return True

    def to_rows(self) -> bool:
        if self.in_features % BLOCK_SIZE:
            return False
        weight = self.quantized()
        self.codes = pack(weight.codes, BITS)
        self._take_scales(weight, weight.scales.view(self.out_features, -1))
        return True

    def _take_scales(self, weight: NF4Weight, scales: torch.Tensor) -> None:
        """Keep scales and levels as the kernels read them."""
        self.kernel_scales = scales
        if weight.nested is None:
            self.absmax = None  # the scales of the kernels are the same
        self.table = weight.levels.clone()

    def product(self, input: torch.Tensor) -> torch.Tensor:
        if self.kernel_scales is None:
            return super().product(input)
        return packed_linear(
            *(input, self.codes, self.kernel_scales, None, self.table, self.bias),
            *(BITS, BLOCK_SIZE, self.out_features, self.activations),
        )

    def quantized(self, rows: slice = slice(None)) -> NF4Weight:
        """The weight, or some rows of it, which begin with an even one."""
        start, stop, _ = rows.indices(self.out_features)
        first, last = start * self.in_features, stop * self.in_features
        if self.in_strips:
            codes = rows_from_strips(self.codes, BITS, BLOCK_SIZE, self.in_features, slice(start, stop))
        elif self.in_rows:
            codes = unpack(self.codes[start:stop], BITS, self.in_features).contiguous()
        else:
            shape = (stop - start, self.in_features)
            codes = unpack_high_first(self.codes[first // 2 : -(-last // 2)], shape)
        blocks = slice(first // BLOCK_SIZE, -(-last // BLOCK_SIZE))
        nested = self._nested(blocks)
        if self.absmax is None:
            assert self.kernel_scales is not None
            scales = self.kernel_scales
            absmax = groups_from_strips(scales, self.out_features) if self.in_strips else scales
            absmax = absmax.reshape(-1)
        else:
            absmax = self.absmax.view(torch.float32) if nested is None else self.absmax
        return NF4Weight(
            codes,
            absmax[blocks],
            self.levels.view(torch.float32),
            self.dtype,
            nested,
            first=first % BLOCK_SIZE,
            first_scale=blocks.start % NESTED_BLOCK_SIZE,
        )

    def _nested(self, blocks: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """How the scales of some blocks are decoded; None if they are not quantized."""
        if self.get_buffer(NESTED[0]) is None:
            return None
        scales, levels, mean = (self.get_buffer(name).view(torch.float32) for name in NESTED)
        return scales[blocks.start // NESTED_BLOCK_SIZE : -(-blocks.stop // NESTED_BLOCK_SIZE)], levels, mean
