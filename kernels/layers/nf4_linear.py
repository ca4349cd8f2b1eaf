"""A linear layer whose weight stays in NF4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compress.kernels.codes.nf4 import BLOCK, NF4Weight, pack_high_first, unpack_high_first
from compress.kernels.reference.ops import BLOCK as ELEMENTS


class NF4Linear(nn.Module):
    """``nn.Linear`` over an NF4 weight of bitsandbytes, for inference.

    Scales are held in float32, in buffers of bytes, so that moving the module to another dtype leaves them as
    they are. Buffers are not part of the state dict.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.register_buffer("codes", pack_high_first(weight.codes), persistent=False)
        self.register_buffer("scales", weight.scales.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("levels", weight.levels.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def quantized(self, start: int = 0, stop: int | None = None) -> NF4Weight:
        """The rows from ``start``, which is even, to ``stop``; without them the whole weight."""
        stop = self.out_features if stop is None else stop
        first, last = start * self.in_features, stop * self.in_features
        codes = unpack_high_first(self.codes[first // 2 : -(-last // 2)], (stop - start, self.in_features))
        scales = self.scales.view(torch.float32)[first // BLOCK : -(-last // BLOCK)]
        levels = self.levels.view(torch.float32)
        return NF4Weight(codes, scales, levels, self.dtype, None, first % BLOCK)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``; a few rows are dequantized at a time."""
        rows = self.out_features
        if input.device.type == "cpu":
            rows = max(2, ELEMENTS // self.in_features // 2 * 2)
        result = input.new_empty((*input.shape[:-1], self.out_features))
        for start in range(0, self.out_features, rows):
            stop = min(start + rows, self.out_features)
            weight = self.quantized(start, stop).dequantize().to(input.dtype)
            bias = None if self.bias is None else self.bias[start:stop]
            result[..., start:stop] = F.linear(input, weight, bias)
        return result

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes and scales take in memory."""
        return self.codes.nbytes + self.scales.nbytes + self.levels.nbytes

    @property
    def kernel(self) -> str:
        """The backend that runs this layer."""
        return "reference"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
