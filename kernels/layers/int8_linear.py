"""A linear layer of LLM.int8(): 8-bit weights and inputs, but for input channels with outliers."""

from __future__ import annotations

import torch
from torch import nn

from compress.kernels.codes.int8 import LARGEST, Int8Weight
from compress.kernels.reference.ops import BLOCK

SCALE = 1 / LARGEST**2


class Int8Linear(nn.Module):
    """``nn.Linear`` over an int8 weight of bitsandbytes, for inference.

    As in the library, inputs are rounded to float16 before anything else, and outliers are looked for in all
    tokens of a call at once. Row maxima are held in float32, in a buffer of bytes, so that moving the module
    to another dtype leaves them as they are. Buffers are not part of the state dict.

    bitsandbytes 0.50 multiplies by 6.200124e-05 on a CPU where this divides by 127^2: its outputs are larger
    by 2e-5 of their size. That is enough to round some inputs of the linears after it to the next number.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.threshold = weight.threshold
        self.register_buffer("codes", weight.codes.contiguous(), persistent=False)
        self.register_buffer("absmax", weight.absmax.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def quantized(self, rows: slice = slice(None)) -> Int8Weight:
        """The weight, or some rows of it."""
        return Int8Weight(self.codes[rows], self.absmax.view(torch.float32)[rows], self.threshold)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``; a few rows of the weight are used at a time."""
        tokens = input.reshape(-1, self.in_features)
        codes, absmax, outliers = quantize_inputs(tokens, self.threshold)
        kept = tokens[:, outliers]
        rows = max(1, BLOCK // self.in_features) if input.device.type == "cpu" else self.out_features
        result = input.new_empty((len(tokens), self.out_features))
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            weight = self.quantized(part)
            # Sums of whole numbers: exact in float32 below 2^24, whatever the order.
            product = codes @ weight.codes.float().T
            product *= absmax[:, None] * (weight.absmax * SCALE)
            if self.bias is not None:
                product += self.bias[part]
            output = product.to(input.dtype)
            if len(outliers):
                columns = Int8Weight(weight.codes[:, outliers], weight.absmax, self.threshold)
                output = torch.addmm(output, kept, columns.dequantize().to(input.dtype).T)
            result[:, part] = output
        return result.view(*input.shape[:-1], self.out_features)

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes and row maxima take in memory."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def kernel(self) -> str:
        """The backend that runs this layer."""
        return "reference"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, threshold={self.threshold}, "
            f"bias={self.bias is not None}"
        )


def quantize_inputs(
    tokens: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vector-wise quantization of inputs [tokens, in], rounded to float16, without columns of outliers.

    Values from ``threshold`` on do not count in a token's maximum; smaller ones of the same column do, as in
    the library.

    Returns:
        Codes, whole numbers from -127 to 127 in float32 [tokens, in], 0 in the columns of outliers; the
        maxima, float32 [tokens]; and the numbers of the columns.
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
