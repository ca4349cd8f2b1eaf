"""A linear layer whose weight stays in NF4."""

from __future__ import annotations

import torch

from compress.kernels.codes.nf4 import BLOCK_SIZE, NF4Weight, pack_high_first, unpack_high_first
from compress.kernels.layers.base import LowBitLinear


class NF4Linear(LowBitLinear):
    """``nn.Linear`` over an NF4 weight of bitsandbytes, for inference.

    Scales and levels are float32 numbers held as bytes, so that casting the module to another dtype leaves
    them as they are. Scales that were quantized themselves are held dequantized.
    """

    row_multiple = 2  # because a byte holds two codes, and an odd row may end inside one

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        self.dtype = weight.dtype
        self.register_buffer("codes", pack_high_first(weight.codes), persistent=False)
        self.register_buffer("scales", weight.scales.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("levels", weight.levels.contiguous().view(torch.uint8), persistent=False)

    def quantized(self, rows: slice = slice(None)) -> NF4Weight:
        """The weight, or some rows of it, which begin with an even one."""
        start, stop, _ = rows.indices(self.out_features)
        first, last = start * self.in_features, stop * self.in_features
        codes = unpack_high_first(self.codes[first // 2 : -(-last // 2)], (stop - start, self.in_features))
        scales = self.scales.view(torch.float32)[first // BLOCK_SIZE : -(-last // BLOCK_SIZE)]
        levels = self.levels.view(torch.float32)
        return NF4Weight(codes, scales, levels, self.dtype, None, first % BLOCK_SIZE)

    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        return self.quantized(rows).dequantize()
