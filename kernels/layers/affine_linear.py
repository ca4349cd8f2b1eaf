"""A linear layer over integer codes of another program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch

from compress.kernels.codes.affine import AffineWeight
from compress.kernels.codes.packing import pack, unpack
from compress.kernels.layers.base import CodedLinear, check_same, restore_dtypes


class AffineLinear(CodedLinear):
    """``nn.Linear`` over an `AffineWeight`, for inference. It runs in plain torch on every device.

    Scales and biases keep the dtype they were stored with when the module is cast to another dtype.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    biases: torch.Tensor | None
    groups: torch.Tensor

    def __init__(self, weight: AffineWeight, bias: torch.Tensor | None = None) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias)
        self.bits = weight.bits
        for name in ("packed", "scales", "zeros", "biases", "groups"):
            self.register_buffer(name, None, persistent=False)
        self.fill(weight)

    def fill(self, weight: AffineWeight) -> None:
        check_same(self, weight, self.bits, weight.bits)
        self.packed = pack(weight.codes, self.bits)
        self.scales, self.zeros, self.biases = weight.scales, weight.zeros, weight.biases
        self.groups = weight.groups

    def to_strips(self) -> bool:
        return False  # the native kernels know other grids

    def quantized(self, rows: slice = slice(None)) -> AffineWeight:
        """The weight, or some rows of it, as codes, scales and offsets."""
        codes = unpack(self.packed[rows], self.bits, self.in_features).contiguous()
        zeros = None if self.zeros is None else self.zeros[rows]
        biases = None if self.biases is None else self.biases[rows]
        return AffineWeight(codes, self.scales[rows], zeros, biases, self.groups, self.bits)

    def rows_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The rows of the weight with these numbers [n]: float32 [n, in]."""
        codes = unpack(self.packed[numbers], self.bits, self.in_features).contiguous()
        zeros = None if self.zeros is None else self.zeros[numbers]
        biases = None if self.biases is None else self.biases[numbers]
        return AffineWeight(codes, self.scales[numbers], zeros, biases, self.groups, self.bits).dequantize()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {"scales": self.scales} | ({} if self.biases is None else {"biases": self.biases})
        super()._apply(fn, recurse)
        restore_dtypes(self, before)
        return self

    def details(self) -> dict[str, object]:
        return {"bits": self.bits, "groups": self.scales.shape[1]}
