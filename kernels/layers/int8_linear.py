"""A linear layer of LLM.int8(): weights and inputs of 8 bits, except for input channels with outliers."""

from __future__ import annotations

import torch

from compress.kernels.codes.int8 import LARGEST, Int8Weight
from compress.kernels.layers.base import CodedLinear, as_bytes, check_same

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

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        self.threshold = weight.threshold
        for name in ("codes", "absmax"):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight)

    def fill(self, weight: Int8Weight) -> None:
        check_same(self, weight, self.threshold, weight.threshold)
        self.codes, self.absmax = weight.codes.contiguous(), as_bytes(weight.absmax)

    def quantized(self, rows: slice = slice(None)) -> Int8Weight:
        """The weight, or some rows of it."""
        return Int8Weight(self.codes[rows], self.absmax.view(torch.float32)[rows], self.threshold)

    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        return self.quantized(rows).dequantize()

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The result of `forward`, without gradient; a few rows of the weight are used at once."""
        tokens = input.reshape(-1, self.in_features)
        codes, absmax, outliers = quantize_inputs(tokens, self.threshold)
        kept = tokens[:, outliers]
        result = input.new_empty((len(tokens), self.out_features))
        for rows in self.row_slices(input.device):
            weight = self.quantized(rows)
            # Sums of whole numbers below 2^24 are exact in float32, whatever their order.
            product = codes @ weight.codes.float().T
            product *= absmax[:, None] * (weight.absmax * SCALE)
            if self.bias is not None:
                product += self.bias[rows]
            output = product.to(input.dtype)
            if len(outliers):
                columns = Int8Weight(weight.codes[:, outliers], weight.absmax, self.threshold)
                output = torch.addmm(output, kept, columns.dequantize().to(input.dtype).T)
            result[:, rows] = output
        return result.view(*input.shape[:-1], self.out_features)

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
