"""Integer codes: every method that stores them goes through here.

A weight W [out, in] is cut along the input axis into groups of g consecutive values. Each group has a scale
s and a zero point z, so that codes q of b bits stand for

    Ŵ = s · (q − z),    q ∈ {0, ..., 2^b − 1}.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.packing import BITS
from compress.kernels.codes.weight import LowBitWeight

CHANNEL = -1
"""The group size that stands for one group per row."""


@dataclass
class QuantizedWeight(LowBitWeight):
    """A weight [out, in] as integer codes.

    Attributes:
        codes: uint8 [out, in], each below 2^bits.
        scales: [out, groups], in the dtype they are stored with.
        zeros: uint8 [out, groups], each below 2^bits; 2^(bits−1) everywhere if symmetric.
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.
        symmetric: whether all zero points are 2^(bits−1), so that formats need not store them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    def dequantize(self) -> torch.Tensor:
        """s · (q − z), float32 [out, in]."""
        out, groups = self.scales.shape
        levels = self.codes.view(out, groups, -1).float() - self.zeros.float().unsqueeze(-1)
        return (levels * self.scales.float().unsqueeze(-1)).view(self.codes.shape)

    def split(self, rows: list[int]) -> list[Self]:
        parts = zip(*(each.split(rows) for each in (self.codes, self.scales, self.zeros)), strict=True)
        return [replace(self, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """The inverse of `split`."""
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zeros=torch.cat([part.zeros for part in parts]),
        )

    def same_as(self, other: Self) -> bool:
        return (
            (self.bits, self.group_size, self.symmetric) == (other.bits, other.group_size, other.symmetric)
            and self.scales.dtype == other.scales.dtype
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scales, other.scales)
            and torch.equal(self.zeros, other.zeros)
        )


def quantize_weight(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    name: str = "weight",
    check: bool = True,
) -> QuantizedWeight:
    """Round a weight to the nearest points of a grid, which is chosen for each group from its extremes.

    - Asymmetric: the grid spans [min(W_g, 0), max(W_g, 0)], s = range / (2^b − 1), z = round(−min / s).
    - Symmetric: z = 2^(b−1) leaves one more level below than above. The grid is turned so that this level
      serves the side with the larger magnitude: s = −v / 2^(b−1), where v is the value of largest magnitude.
      So v itself is exactly representable (code 0), and **s is negative where v is positive**. Compared with
      the usual s = max|W_g| / (2^(b−1) − ½) the error is lower at every number of bits, and at 2 bits all
      four levels are used. On the other side, values beyond 2^(b−1) − 1 steps are rounded down to that.

    Scales are rounded to ``scale_dtype`` before the codes are computed, so the codes are the nearest ones for
    the scales that are stored. A scale too small for ``scale_dtype`` is rounded away from 0. A group of zeros
    gets the scale 1 and dequantizes to zeros.

    Args:
        weight: [out, in], any floating-point dtype; arithmetic is in float32.
        bits: 2 to 8.
        group_size: values in a group, a divisor of ``in``; −1 for one group per row.
        symmetric: see above.
        scale_dtype: float16, bfloat16 or float32.
        name: what error messages call the weight.
        check: whether the weight and its scales are checked, which waits for the device.

    Raises:
        BadInput: the group size does not divide ``in``; or, with ``check``, the weight holds NaN, infinity or
            values so large that ``scale_dtype`` cannot represent a scale.
        ValueError: another number of bits.
    """
    if bits not in BITS:
        raise ValueError(f"Weights have {BITS[0]} to {BITS[-1]} bits, not {bits}.")
    out, width = weight.shape
    groups = number_of_groups(width, group_size, name)
    grouped = weight.float().reshape(out, groups, -1)
    scales, zeros = choose_grid(grouped, bits, symmetric, scale_dtype, name if check else None)
    codes = nearest_codes(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), bits)
    return QuantizedWeight(
        codes=codes.view(out, width).to(torch.uint8),
        scales=scales,
        zeros=zeros.to(torch.uint8),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def nearest_codes(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """clamp(round(w / s) + z, 0, 2^b − 1) in the dtype of ``values``; scales and zeros are broadcast."""
    return (values / scales.to(values.dtype)).round_().add_(zeros).clamp_(0, 2**bits - 1)


def choose_grid(
    grouped: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, name: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points for groups of weights, as `quantize_weight` explains.

    Args:
        grouped: float32 [out, groups, group_size].
        bits, symmetric, scale_dtype: as in `quantize_weight`.
        name: as in `quantize_weight`. None checks nothing, for one grid of many that are tried: a check waits
            for the device.

    Returns:
        Scales [out, groups] in ``scale_dtype``, and zero points, whole numbers in float32 [out, groups].

    Raises:
        BadInput: as `quantize_weight`.
    """
    low, high = grouped.amin(-1), grouped.amax(-1)  # NaN where any value is
    if name is not None and not bool((low.isfinite() & high.isfinite()).all()):
        raise BadInput(f"The weight of '{name}' holds NaN or infinity; this model cannot be quantized.")
    return grid_between(low, high, bits, symmetric, scale_dtype, name)


def grid_between(
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    name: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points for groups whose extremes ``low`` and ``high`` are given, float32 [out, groups].

    It returns and raises the same as `choose_grid`.
    """
    half, top = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scales = torch.where(high > -low, -high, -low) / half
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        # Divide first, because the range of a group may be more than float32 can hold.
        scales = high / top - low / top
    scales = storable(scales, scale_dtype, name)
    scales[(low == 0) & (high == 0)] = 1
    step = scales.float()
    zeros = torch.full_like(step, half) if symmetric else (-low / step).round_().clamp_(0, top)
    return scales, zeros


def number_of_groups(width: int, group_size: int, name: str) -> int:
    """The number of groups in a row of ``width`` values.

    Raises:
        BadInput: ``group_size`` does not divide ``width``.
    """
    if group_size == CHANNEL:
        return 1
    if group_size < 1 or width % group_size:
        raise BadInput(
            f"A group size of {group_size} does not divide the input dimension {width} of '{name}'; "
            f"use {', '.join(divisors_near(width, group_size) or [str(width)])} or channel."
        )
    return width // group_size


def divisors_near(width: int, wanted: int) -> list[str]:
    """Group sizes a user may have meant: powers of two that divide ``width``, or else any divisors."""
    divisors = [size for size in range(8, width + 1) if width % size == 0]
    powers = [size for size in divisors if size & (size - 1) == 0]
    near = sorted(sorted(powers or divisors, key=lambda size: abs(size - wanted))[:3])
    return [str(size) for size in near]


def storable(scales: torch.Tensor, dtype: torch.dtype, name: str | None) -> torch.Tensor:
    """Round scales to ``dtype``, away from 0.

    Raises:
        BadInput: a scale is too large for ``dtype``, unless ``name`` is None.
    """
    stored = scales.to(dtype)
    if name is not None and not bool(torch.isfinite(stored).all()):
        raise BadInput(
            f"The weight of '{name}' needs a scale of {float(scales.abs().max()):.2g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use the format compressed-tensors on a bfloat16 model."
        )
    # Below the normal numbers of float16 the steps are coarse, so scales are rounded away from 0, lest the
    # grid be cut short. Below those of float32 and bfloat16 arithmetic may flush to 0, so scales become the
    # smallest normal number.
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    small = scales.abs() < torch.finfo(dtype).smallest_normal
    steps = (scales.abs() / smallest).ceil()
    return torch.where(small, torch.copysign(steps * smallest, scales).to(dtype), stored)
