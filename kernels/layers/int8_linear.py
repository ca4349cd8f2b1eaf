"""A linear layer of LLM.int8(): weights and inputs of 8 bits, except for input channels with outliers."""

from __future__ import annotations

import torch

from compress.kernels.codes.int8 import LARGEST, Int8Weight
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.cpu.layout import STRIP, groups_to_strips, rows_from_strips, to_strips
from compress.kernels.layers.base import CodedLinear, as_bytes, check_same
from compress.kernels.ops import packed_linear
from compress.kernels.reference.ops import linear_by_rows

BITS = 8
"""Bits of a code."""

SCALE = 1 / LARGEST**2


class Int8Linear(CodedLinear):
    """``nn.Linear`` over an int8 weight of bitsandbytes, for inference.

    As in the library, inputs are first rounded to float16, and a channel holds outliers if it does so in any
    token of the call. Row maxima are float32 numbers held as bytes, so that casting the module to another
    dtype leaves them as they are.

    On a CPU, bitsandbytes 0.50 multiplies by 6.200124e-05 where this divides by 127², so its outputs are
    larger by a relative 2e-5. That is enough to round some inputs of later linears to the next number.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    ones: torch.Tensor | None

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        self.threshold = weight.threshold
        for name in ("codes", "absmax", "ones"):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight)

    def fill(self, weight: Int8Weight) -> None:
        check_same(self, weight, self.threshold, weight.threshold)
        self.codes, self.absmax = weight.codes.contiguous(), as_bytes(weight.absmax)
        self.in_strips, self.ones = False, None

    def to_strips(self) -> bool:
        # The kernels read unsigned codes, whose zero point is 128.
        self.codes = to_strips(self.codes.view(torch.uint8) ^ 128, BITS, CHANNEL)
        self.ones = groups_to_strips(torch.ones(self.out_features, 1, dtype=torch.float32))
        return True

    def quantized(self, rows: slice = slice(None)) -> Int8Weight:
        """The weight, or some rows of it."""
        if self.in_strips:
            rows = slice(*rows.indices(self.out_features))
            unsigned = rows_from_strips(self.codes, BITS, CHANNEL, self.in_features, rows)
            codes = (unsigned ^ 128).view(torch.int8)
        else:
            codes = self.codes[rows]
        return Int8Weight(codes, self.absmax.view(torch.float32)[rows], self.threshold)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The result of `forward`, without gradient."""
        tokens = input.reshape(-1, self.in_features)
        codes, absmax, outliers = quantize_inputs(tokens, self.threshold)
        weight_absmax = self.absmax.view(torch.float32)
        product = self._whole_product(codes) * (absmax[:, None] * (weight_absmax * SCALE))
        result = (product if self.bias is None else product + self.bias).to(input.dtype)
        if len(outliers):
            columns = Int8Weight(self._columns(outliers), weight_absmax, self.threshold).dequantize()
            result = torch.addmm(result, tokens[:, outliers], columns.to(input.dtype).T)
        return result.view(*input.shape[:-1], self.out_features)

    def _whole_product(self, inputs: torch.Tensor) -> torch.Tensor:
        """Whole numbers [tokens, in] times codes: float32 [tokens, out]."""
        if self.ones is None:
            # Sums of whole numbers below 2^24 are exact in float32, whatever their order.
            return linear_by_rows(inputs, self.out_features, lambda rows: self.codes[rows].float(), None)
        return packed_linear(
            *(inputs, self.codes, self.ones, None, None, None, BITS, CHANNEL, self.out_features, "floating")
        )

    def _columns(self, numbers: torch.Tensor) -> torch.Tensor:
        """The codes of some inputs: int8 [out, n]."""
        if not self.in_strips:
            return self.codes[:, numbers]
        words = self.codes.view(len(self.codes), -1, STRIP, 4)  # four columns of a row in a word
        columns = words[:, numbers // 4, :, numbers % 4]  # [n, strips, 16]: indices that are apart come first
        return (columns.permute(1, 2, 0).reshape(-1, len(numbers))[: self.out_features] ^ 128).view(
            torch.int8
        )

    def details(self) -> dict[str, object]:
        return {"threshold": self.threshold}


def quantize_inputs(
    tokens: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize every token of the inputs [tokens, in], rounded to float16, without channels of outliers.

    An outlier is a value of at least ``threshold``; 0 means that there are none. It does not count in the
    maximum of its token, but smaller values of the same channel do, as in the library.

    Returns:
        Codes, whole numbers from −127 to 127 in float32 [tokens, in], which are 0 in channels of outliers;
        the maxima, float32 [tokens]; and the numbers of the channels of outliers, int64 [outliers].
    """
    values = tokens.to(torch.float16).float()
    large = values.abs() >= threshold if threshold else torch.zeros_like(values, dtype=torch.bool)
    values = values.masked_fill(large, 0)
    absmax = values.abs().amax(-1)
    scale = torch.where(absmax == 0, 0, LARGEST / absmax)
    codes = (values * scale[:, None]).round()
    outliers = large.any(0)
    codes[:, outliers] = 0
    return codes, absmax, outliers.nonzero()[:, 0]
