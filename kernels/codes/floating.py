"""Low-bit floating-point numbers: FP8, MXFP4 and NVFP4.

A weight W [out, in] is cut along the input axis into groups that share a scale s, and Ŵ = s · q, where q is
one of the numbers of a floating-point type:

- ``fp8``: q is E4M3 (at most 448). Each row has one scale, in the dtype of the weight.
- ``mxfp4`` (OCP Microscaling 1.0): q is E2M1 (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives). Groups of 32
  share a scale, a power of two that is stored as its exponent plus 127 in a byte (E8M0).
- ``nvfp4``: q is E2M1. Groups of 16 share a scale, an E4M3 number divided by G, and G is one float32 for the
  whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import number_of_groups, storable
from compress.kernels.codes.weight import LowBitWeight

FloatType = Literal["fp8", "mxfp4", "nvfp4"]
ScaleRounding = Literal["ceil", "floor"]

E4M3 = torch.float8_e4m3fn
E4M3_MAX, E2M1_MAX = 448.0, 6.0
GROUP_SIZES: dict[str, int] = {"fp8": -1, "mxfp4": 32, "nvfp4": 16}
"""Type -> values that share a scale; −1 for a whole row."""

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))
"""The number that each of the 16 codes stands for. Bit 3 of a code is the sign."""

# The middles between neighbouring magnitudes: what lies above the first rounds to ½ or more, and so on. A
# middle itself rounds to the even code, as in IEEE arithmetic. So 0.25, 1.25, 2.5 and 5 round down, and the
# others round up, because the limit is set just below them.
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_MIDDLES[1::2] = torch.nextafter(_MIDDLES[1::2], torch.tensor(0.0))


@dataclass
class FloatWeight(LowBitWeight):
    """A weight [out, in] as low-bit floating-point numbers.

    Attributes:
        type: which floating-point type.
        codes: float8_e4m3fn [out, in] for ``fp8``, else the codes of E2M1, uint8 [out, in].
        scales: [out, groups], as they are stored: floating point (``fp8``), uint8 (E8M0, ``mxfp4``) or
            float8_e4m3fn (``nvfp4``).
        global_scale: G, float32 [1], for ``nvfp4`` only.
    """

    type: FloatType
    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None = None

    def split(self, rows: list[int]) -> list[Self]:
        parts = zip(self.codes.split(rows), self.scales.split(rows), strict=True)
        return [replace(self, codes=codes, scales=scales) for codes, scales in parts]

    def dequantize(self) -> torch.Tensor:
        """s · q, float32 [out, in]."""
        out, groups = self.scales.shape
        numbers = self.codes.float() if self.type == "fp8" else E2M1.to(self.codes.device)[self.codes.int()]
        scales = real_scales(self.scales, self.global_scale)
        return (numbers.view(out, groups, -1) * scales.unsqueeze(-1)).view(self.codes.shape)

    def same_as(self, other: Self) -> bool:
        mine, theirs = (
            [
                item.contiguous().view(torch.uint8)
                for item in (w.codes, w.scales, w.global_scale)
                if item is not None
            ]
            for w in (self, other)
        )
        return self.type == other.type and len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def real_scales(scales: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """Decode stored scales [out, groups] to float32 and divide them by the global scale if there is one."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float() if global_scale is None else scales.float() / global_scale


def quantize_float(
    weight: torch.Tensor,
    type: FloatType,
    scale_dtype: torch.dtype,
    scale_rounding: ScaleRounding = "ceil",
    largest: torch.Tensor | None = None,
    name: str = "weight",
) -> FloatWeight:
    """Round a weight to the nearest numbers of a floating-point type.

    The scale of a group follows from its largest magnitude:

    - ``fp8``: s = max|w| / 448.
    - ``mxfp4``: ``floor`` is the rule of the standard, s = 2^(floor(log2 max|w|) − 2), which cuts values
      above 6 s to 6 s; ``ceil`` is s = 2^ceil(log2(max|w| / 6)), which cuts none.
    - ``nvfp4``: G = 448 · 6 / max|W|. The group stores G · max|w| / 6 as E4M3, at least its smallest number.

    A group of zeros gets the scale 1 (``fp8``, ``mxfp4``) or the smallest one (``nvfp4``).

    Args:
        weight: [out, in], any floating-point dtype; arithmetic is in float32.
        type: which floating-point type.
        scale_dtype: of the scales of ``fp8``: float16, bfloat16 or float32.
        scale_rounding: of the scales of ``mxfp4``.
        largest: what ``nvfp4`` takes for max|W|, so that linears which other programs fuse can share a G;
            None for that of this weight.
        name: what error messages call the weight.

    Raises:
        BadInput: the group size does not divide ``in``, or the weight holds NaN, infinity or values that are
            out of range.
    """
    out, width = weight.shape
    groups = number_of_groups(width, GROUP_SIZES[type], name)
    grouped = weight.float().contiguous().view(out, groups, -1)
    if not bool(torch.isfinite(grouped).all()):
        raise BadInput(f"The weight of '{name}' holds NaN or infinity; this model cannot be quantized.")
    magnitude = grouped.abs().amax(-1)
    global_scale = None
    if type == "fp8":
        scales = storable(magnitude / E4M3_MAX, scale_dtype, name)
        scales[magnitude == 0] = 1
    elif type == "mxfp4":
        mantissa, exponent = torch.frexp(magnitude)  # magnitude = mantissa 2^exponent, mantissa in [½, 1)
        exponent = exponent - 3
        if scale_rounding == "ceil":
            exponent += (mantissa > E2M1_MAX / 8).int()
        exponent[magnitude == 0] = 0
        scales = (exponent + 127).clamp(0, 254).to(torch.uint8)
    else:
        largest = magnitude.max() if largest is None else largest.to(magnitude)
        global_scale = (E4M3_MAX * E2M1_MAX / largest).reshape(1)
        global_scale[~global_scale.isfinite()] = 1  # the weight is zero, or so small that it becomes zero
        stored = (magnitude / E2M1_MAX * global_scale).clamp(2.0**-9, E4M3_MAX)
        scales = stored.to(E4M3)
    steps = grouped / real_scales(scales, global_scale).unsqueeze(-1)
    if type == "fp8":
        codes = steps.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    else:
        codes = torch.bucketize(steps.abs(), _MIDDLES.to(steps.device), out_int32=True).to(torch.uint8)
        codes += (steps < 0).to(torch.uint8) << 3
    return FloatWeight(type, codes.view(out, width), scales, global_scale)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes: uint8 [out, in] -> uint8 [out, in / 2], the first of two codes in the low half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
