"""A linear layer whose weight stays in a low-bit floating format."""

from __future__ import annotations

from typing import Any

import torch

from compress.kernels.codes.floating import (
    E2M1,
    E4M3,
    E4M3_MAX,
    GROUP_SIZES,
    FloatType,
    FloatWeight,
    pack_nibbles,
    real_scales,
    unpack_nibbles,
)
from compress.kernels.cpu.layout import (
    groups_from_strips,
    groups_to_strips,
    rows_from_strips,
    to_strips,
)
from compress.kernels.layers.base import CodedLinear, as_bytes, check_same
from compress.kernels.ops import packed_linear


class FloatLinear(CodedLinear):
    """``nn.Linear`` over an FP8, MXFP4 or NVFP4 weight, for inference.

    With ``fp8`` the input is rounded as well: every token to E4M3 under a scale of its own, max|x| / 448, as
    compressed-tensors does it (FP8_DYNAMIC). Codes and scales are held as bytes, so that casting the module
    to another dtype leaves them as they are stored.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None
    table: torch.Tensor | None
    _codes: torch.Tensor | None

    def __init__(self, weight: FloatWeight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        self.float_type: FloatType = weight.type
        for name in ("codes", "scales", "global_scale", "table"):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight)

    def fill(self, weight: FloatWeight) -> None:
        check_same(self, weight, self.float_type, weight.type)
        self.scale_dtype = weight.scales.dtype
        codes = weight.codes.view(torch.uint8) if weight.type == "fp8" else pack_nibbles(weight.codes)
        self.codes, self.scales = codes.contiguous(), as_bytes(weight.scales)
        self.global_scale = None if weight.global_scale is None else as_bytes(weight.global_scale)
        self.table, self.in_strips, self.in_rows, self._codes = None, False, False, None

    def to_strips(self) -> bool:
        weight = self.quantized()
        self.codes = to_strips(weight.codes.view(torch.uint8), self.bits, GROUP_SIZES[self.float_type])
        # Powers of two and E4M3 are exact in bfloat16.
        scales = weight.scales if self.float_type == "fp8" else real_scales(weight.scales, None).bfloat16()
        self.scales = groups_to_strips(scales)
        self._take_table()
        return True

    def to_rows(self) -> bool:
        # Codes and scales are read as they are stored.
        if self.in_features * self.bits % 32:
            return False
        self._take_table()
        return True

    def _take_table(self) -> None:
        """Keep the numbers of the codes of 4 bits. The scale that NVFP4 has for all is in them."""
        if self.float_type != "fp8":
            numbers = E2M1.to(self.codes.device)
            scale = self.global_scale
            self.table = numbers if scale is None else numbers / scale.view(torch.float32)

    def _scales_in_rows(self) -> torch.Tensor:
        """The scales as they are stored, [out, groups]."""
        if not self.in_strips:
            return self.scales.view(self.scale_dtype)
        scales = groups_from_strips(self.scales, self.out_features)
        if self.float_type == "mxfp4":
            return (torch.log2(scales.float()) + 127).to(self.scale_dtype)
        return scales.to(self.scale_dtype)

    def quantized(self, rows: slice = slice(None)) -> FloatWeight:
        """The weight, or some rows of it."""
        if self.in_strips:
            rows = slice(*rows.indices(self.out_features))
            group_size = GROUP_SIZES[self.float_type]
            codes = rows_from_strips(self.codes, self.bits, group_size, self.in_features, rows)
        else:
            codes = self.codes[rows] if self.float_type == "fp8" else unpack_nibbles(self.codes[rows])
        codes = codes.view(E4M3) if self.float_type == "fp8" else codes
        global_scale = None if self.global_scale is None else self.global_scale.view(torch.float32)
        return FloatWeight(self.float_type, codes, self._scales_in_rows()[rows], global_scale)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.float_type == "fp8" else 4

    def product(self, input: torch.Tensor) -> torch.Tensor:
        input = round_tokens(input) if self.float_type == "fp8" else input
        if not self.in_strips and not self.in_rows:
            return super().product(input)
        if self._codes is None:  # kept, because the operator describes a weight once for each tensor
            of_rows = torch.int32 if self.in_rows else torch.uint8
            self._codes = self.codes.view(E4M3 if self.float_type == "fp8" else of_rows)
        scales = self.scales.view(self.scale_dtype) if self.in_rows else self.scales
        return packed_linear(
            *(input, self._codes, scales, None, self.table, self.bias),
            *(self.bits, GROUP_SIZES[self.float_type], self.out_features, self.activations),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_codes": None}  # E4M3 cannot be pickled

    def details(self) -> dict[str, object]:
        return {"type": self.float_type}


def round_tokens(input: torch.Tensor) -> torch.Tensor:
    """Round each token [..., in] to E4M3 under a scale of its own; the result has the dtype of ``input``."""
    scale = input.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (input / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).to(input.dtype) * scale
