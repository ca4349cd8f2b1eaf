"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, number_of_groups
from compress.kernels.codes.minmax import fake_quantize
from compress.kernels.codes.packing import pack, packed_width, unpack
from compress.kernels.ops import kernel_name, packed_linear


class PackedLinear(nn.Module):
    """``nn.Linear`` over a packed weight, for inference.

    It is created empty, on the meta device unless another is given, and filled with `fill`. Its buffers are
    not part of the state dict: checkpoint formats have names and layouts of their own. The scales keep the
    dtype they were stored with when the module is moved to another dtype, because rounding them again would
    change the weight.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bits: 2, 3, 4 or 8.
        group_size: values in a group along the input axis; −1: a whole row.
        symmetric: zero points are 2^(bits−1) and not stored.
        bias: whether there is one.
        scale_dtype: of the scales.
        dtype: of the bias.

    Raises:
        BadInput: the group size does not divide ``in_features``.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

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
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = number_of_groups(in_features, group_size, "PackedLinear")

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, there: bool = True) -> None:
            empty = torch.empty(shape, dtype=dtype, device=device) if there else None
            self.register_buffer(name, empty, persistent=False)

        buffer("packed", (out_features, packed_width(in_features, bits)), torch.int32)
        buffer("scales", (out_features, groups), scale_dtype)
        buffer("zeros", (out_features, groups), torch.uint8, there=not symmetric)
        buffer("bias", (out_features,), dtype, there=bias)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> PackedLinear:
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
        layer.fill(weight, bias)
        return layer

    def fill(self, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        """Take over a weight and a bias [out] of the shape and kind the layer was made for."""
        mine = (self.out_features, self.in_features, self.bits, self.group_size, self.symmetric)
        given = (*weight.shape, weight.bits, weight.group_size, weight.symmetric)
        if mine != given or (bias is None) != (self.bias is None):
            raise ValueError(f"A layer of (out, in, bits, group size, symmetric) {mine} was given {given}.")
        self.packed = pack(weight.codes, self.bits)
        self.scales = weight.scales.contiguous()
        self.zeros = None if self.symmetric else weight.zeros.contiguous()
        self.bias = None if bias is None else bias.detach()

    def quantized(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points."""
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full_like(self.scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        codes = unpack(self.packed, self.bits, self.in_features).contiguous()
        return QuantizedWeight(codes, self.scales, zeros, self.bits, self.group_size, self.symmetric)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return packed_linear(
            input, self.packed, self.scales, self.zeros, self.bias, self.bits, self.group_size
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes, scales and zero points take in memory."""
        return sum(part.nbytes for part in (self.packed, self.scales, self.zeros) if part is not None)

    @property
    def kernel(self) -> str:
        """The backend that runs this layer where it is."""
        return kernel_name(self.packed.device, self.bits)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        group = "channel" if self.group_size == CHANNEL else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={group}, symmetric={self.symmetric}, bias={self.bias is not None}"
        )


class TokenQuantizedLinear(PackedLinear):
    """A packed linear whose input is quantized, too: ``activation_bits`` bits, one scale a token, made anew
    at every call (see `compress.kernels.codes.minmax`).

    For 8 bits, compressed-tensors 0.20 takes max|x| / 127.5 as the scale where this takes max|x| / 127, as in
    LLM-QAT's training; so logits in stock transformers differ, by about what 8 bits lose.
    """

    activation_bits: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(fake_quantize(input, self.activation_bits))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}"
