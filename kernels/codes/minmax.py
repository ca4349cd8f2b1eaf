"""The quantizer of LLM-QAT: symmetric MinMax over the last axis, with a straight-through gradient.

    s = (max|x| + 1e-6) / qmax,    x̂ = s · round(x / s),    qmax = 2^(b−1) − 1

Everything along the last axis shares one scale: an output channel of a weight [out, in], or a token of
activations [..., in]. The published code multiplies by 1 / s and later divides by 1 / s + 1e-6, so its values
lie on no grid. Here s is what is stored, so codes times scales are exactly the values of the training. The
lowest code, −2^(b−1), is never used.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight

EPSILON = 1e-6

CUT = 2.0
"""Where the published gradient is cut: values of at least this magnitude get none."""


def quantize(
    values: torch.Tensor, bits: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to codes.

    Args:
        values: [..., n], any floating-point dtype; arithmetic is in float32.
        bits: 2 to 8.
        scale_dtype: of the scales, which are rounded to it before the codes are computed.

    Returns:
        Codes, whole numbers from −qmax to qmax in float32 [..., n], and scales [..., 1] in ``scale_dtype``.
    """
    top = 2 ** (bits - 1) - 1
    values = values.float()
    scales = (values.abs().amax(-1, keepdim=True) + EPSILON) / top
    if scale_dtype == torch.float16:
        scales = scales.clamp(min=2.0**-24)  # the smallest number of float16 above 0
    scales = scales.to(scale_dtype)
    return (values / scales.float()).round_().clamp_(-top, top), scales


def fake_quantize(
    values: torch.Tensor, bits: int, scale_dtype: torch.dtype = torch.float32, cut: float | None = None
) -> torch.Tensor:
    """Round values [..., n] to x̂, in their own dtype.

    The gradient passes as if nothing were rounded. With ``cut``, none passes where |x| >= ``cut``.
    """
    return _StraightThrough.apply(values, bits, scale_dtype, cut)


def quantize_channels(
    weight: torch.Tensor, bits: int, scale_dtype: torch.dtype, name: str = "weight"
) -> QuantizedWeight:
    """Round a weight [out, in] with one scale per output channel.

    The codes are stored as q + 2^(b−1), which every format can hold.

    Raises:
        BadInput: the weight holds NaN or infinity, or values too large for ``scale_dtype``.
    """
    codes, scales = quantize(weight, bits, scale_dtype)
    if not bool(scales.isfinite().all()):
        raise BadInput(
            f"The weight of '{name}' holds NaN or infinity, or values too large for scales in "
            f"{str(scale_dtype).removeprefix('torch.')}; this model cannot be quantized."
        )
    zero = 2 ** (bits - 1)
    return QuantizedWeight(
        codes=(codes + zero).to(torch.uint8),
        scales=scales,
        zeros=torch.full_like(scales, zero, dtype=torch.uint8),
        bits=bits,
        group_size=CHANNEL,
        symmetric=True,
    )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, bits: int, scale_dtype: torch.dtype, cut: float | None
    ) -> torch.Tensor:
        ctx.cut = cut
        if cut is not None:
            ctx.save_for_backward(values.abs() >= cut)
        codes, scales = quantize(values, bits, scale_dtype)
        return codes.mul_(scales.float()).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.cut is not None:
            upstream = upstream.masked_fill(ctx.saved_tensors[0], 0)
        return upstream, None, None, None
