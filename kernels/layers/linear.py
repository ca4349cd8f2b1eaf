"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch

from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, number_of_groups
from compress.kernels.codes.minmax import fake_quantize
from compress.kernels.codes.packing import pack, packed_width, unpack
from compress.kernels.cpu.layout import (
    groups_from_strips,
    groups_to_strips,
    rows_from_strips,
    to_strips,
)
from compress.kernels.embedding_ops import packed_embedding
from compress.kernels.layers.base import CodedLinear, restore_dtypes
from compress.kernels.ops import backend_of_rows, packed_linear


class PackedLinear(CodedLinear):
    """``nn.Linear`` over a packed weight, for inference.

    It is created empty, on the meta device unless another is given, and filled with `fill`. The scales keep
    the dtype they were stored with when the module is cast to another dtype, because rounding them again
    would change the weight.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.
        symmetric: all zero points are 2^(bits−1) and not stored.
        bias: whether the layer has one.
        scale_dtype: of the scales.
        dtype: of the bias.

    Raises:
        BadInput: the group size does not divide ``in_features``.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        symmetric: bool = True,
        bias: bool = False,
        *,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "meta",
    ) -> None:
        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        super().__init__(in_features, out_features, empty((out_features,), dtype) if bias else None)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        per_group = (out_features, number_of_groups(in_features, group_size, "PackedLinear"))
        packed = empty((out_features, packed_width(in_features, bits)), torch.int32)
        zeros = None if symmetric else empty(per_group, torch.uint8)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", empty(per_group, scale_dtype), persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> Self:
        """A filled layer, on the device of ``weight``."""
        out, width = weight.shape
        layer = cls(
            width,
            out,
            weight.bits,
            weight.group_size,
            weight.symmetric,
            bias is not None,
            scale_dtype=weight.scales.dtype,
        )
        layer.fill(weight)
        layer.bias = None if bias is None else bias.detach().contiguous()
        return layer

    def fill(self, weight: QuantizedWeight) -> None:
        mine = (self.out_features, self.in_features, self.bits, self.group_size, self.symmetric)
        given = (*weight.shape, weight.bits, weight.group_size, weight.symmetric)
        if mine != given:
            raise ValueError(f"A layer of (out, in, bits, group size, symmetric) {mine} was given {given}.")
        self.packed, self.in_strips = pack(weight.codes, self.bits), False
        self.scales = weight.scales.contiguous()
        self.zeros = None if self.symmetric else weight.zeros.contiguous()

    def to_strips(self) -> bool:
        codes = unpack(self.packed, self.bits, self.in_features)
        self.packed = to_strips(codes, self.bits, self.group_size)
        self.scales = groups_to_strips(self.scales)
        self.zeros = None if self.zeros is None else groups_to_strips(self.zeros)
        return True

    def quantized(self, rows: slice = slice(None)) -> QuantizedWeight:
        """The weight, or some rows of it, as codes, scales and zero points."""
        scales, zeros, width = self.scales, self.zeros, self.in_features
        if self.in_strips:
            rows = slice(*rows.indices(self.out_features))
            codes = rows_from_strips(self.packed, self.bits, self.group_size, width, rows)
            scales = groups_from_strips(scales, self.out_features)
            zeros = None if zeros is None else groups_from_strips(zeros, self.out_features)
        else:
            codes = unpack(self.packed[rows], self.bits, width).contiguous()
        scales = scales[rows]
        if zeros is None:
            zeros = torch.full_like(scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zeros = zeros[rows]
        return QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, self.symmetric)

    def rows_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The rows of the weight with these numbers [n]: float32 [n, in]."""
        return packed_embedding(
            *(numbers, self.packed, self.scales, self.zeros),
            *(self.bits, self.group_size, self.out_features, self.in_features),
        )

    @property
    def kernel(self) -> str:
        return super().kernel if self.in_strips else backend_of_rows(self.device)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The result of `forward`, without gradient, by the operator."""
        return packed_linear(
            *(input, self.packed, self.scales, self.zeros, None, self.bias),
            *(self.bits, self.group_size, self.out_features, self.activations),
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {"scales": self.scales}
        super()._apply(fn, recurse)
        restore_dtypes(self, before)
        return self

    def details(self) -> dict[str, object]:
        group_size = "channel" if self.group_size == CHANNEL else self.group_size
        return {"bits": self.bits, "group_size": group_size, "symmetric": self.symmetric}


class TokenQuantizedLinear(PackedLinear):
    """A packed linear that also quantizes its input: to ``activation_bits`` bits, with one scale per token
    that is chosen anew at every call (see `compress.kernels.codes.minmax`).

    At 8 bits, compressed-tensors 0.20 takes the scale max|x| / 127.5, while this takes max|x| / 127, as in
    the training of LLM-QAT. So logits in stock transformers differ, by about as much as 8 bits lose.
    """

    activation_bits: int

    def to_strips(self) -> bool:
        if self.activation_bits == 8:
            self.activations = "int8-token"
        return super().to_strips()

    def product(self, input: torch.Tensor) -> torch.Tensor:
        if not self.in_strips or self.activations == "floating":  # else the kernel rounds them
            input = fake_quantize(input, self.activation_bits)
        return super().product(input)

    def details(self) -> dict[str, object]:
        return {**super().details(), "activation_bits": self.activation_bits}
