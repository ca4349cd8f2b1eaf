"""A linear layer whose weight stays in a low-bit floating format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compress.kernels.codes.floating import (
    E4M3,
    E4M3_MAX,
    FloatType,
    FloatWeight,
    pack_nibbles,
    unpack_nibbles,
)
from compress.kernels.reference.ops import BLOCK


class FloatLinear(nn.Module):
    """``nn.Linear`` over an FP8, MXFP4 or NVFP4 weight, for inference.

    With ``fp8`` the input is rounded, too: every token to E4M3 under a scale of its own, max|x| / 448, as
    compressed-tensors does (FP8_DYNAMIC). Buffers are bytes, so that moving the module to another dtype
    leaves them as they are stored, and not part of the state dict.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: FloatWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.type: FloatType = weight.type
        self.out_features, self.in_features = weight.shape
        self.scale_dtype = weight.scales.dtype
        codes = weight.codes.view(torch.uint8) if weight.type == "fp8" else pack_nibbles(weight.codes)
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("scales", _bytes(weight.scales), persistent=False)
        self.register_buffer("global_scale", _bytes(weight.global_scale), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def quantized(self, rows: slice = slice(None)) -> FloatWeight:
        """The weight, or some rows of it."""
        codes = self.codes[rows]
        codes = codes.view(E4M3) if self.type == "fp8" else unpack_nibbles(codes)
        whole = None if self.global_scale is None else self.global_scale.view(torch.float32)
        return FloatWeight(self.type, codes, self.scales[rows].view(self.scale_dtype), whole)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``; a few rows are dequantized at a time."""
        if self.type == "fp8":
            input = round_tokens(input)
        on_cpu = input.device.type == "cpu"
        rows = max(1, BLOCK // self.in_features) if on_cpu else self.out_features
        result = input.new_empty((*input.shape[:-1], self.out_features))
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            weight = self.quantized(part).dequantize().to(input.dtype)
            result[..., part] = F.linear(input, weight, None if self.bias is None else self.bias[part])
        return result

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes and scales take in memory."""
        parts = (self.codes, self.scales, self.global_scale)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def kernel(self) -> str:
        """The backend that runs this layer."""
        return "reference"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, type={self.type}, "
            f"bias={self.bias is not None}"
        )


def round_tokens(input: torch.Tensor) -> torch.Tensor:
    """Every token [..., in] rounded to E4M3 under its own scale, in the dtype of ``input``."""
    scale = input.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (input / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).to(input.dtype) * scale


def _bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8)
