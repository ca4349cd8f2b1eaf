"""The one integer quantizer: every method that stores whole-number codes goes through it.

A weight W [out, in] is cut along the input axis into groups of g consecutive values. Each group has a scale
s and a zero point z, and

    Ŵ = s · (q − z),    q ∈ {0, ..., 2^b − 1}.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.errors import BadInput
from compress.kernels.codes.packing import BITS

CHANNEL = -1
"""The group size that means one group a row."""


@dataclass
class QuantizedWeight:
    """A weight [out, in] as low-bit codes.

    Attributes:
        codes: uint8 [out, in], each below 2^bits.
        scales: [out, groups], in the dtype they are stored with.
        zeros: uint8 [out, groups], each below 2^bits; 2^(bits−1) everywhere if symmetric.
        bits: 2, 3, 4 or 8.
        group_size: values in a group along the input axis; −1: a whole row.
        symmetric: whether all zero points are 2^(bits−1), so that formats need not store them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """s · (q − z) in float32 [out, in]."""
        out, groups = self.scales.shape
        levels = self.codes.view(out, groups, -1).float() - self.zeros.float().unsqueeze(-1)
        return (levels * self.scales.float().unsqueeze(-1)).view(self.codes.shape)

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """Blocks of so many rows each."""
        parts = zip(*(each.split(rows) for each in (self.codes, self.scales, self.zeros)), strict=True)
        return [replace(self, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]

    @classmethod
    def joined(cls, blocks: list[QuantizedWeight]) -> QuantizedWeight:
        """The inverse of `split`."""
        names = ("codes", "scales", "zeros")
        return replace(
            blocks[0], **{name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
        )

    def same_as(self, other: QuantizedWeight) -> bool:
        """Whether both hold the same codes, scales (bit for bit) and zero points."""
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
) -> QuantizedWeight:
    """Round a weight to the nearest point of a grid chosen per group from its extremes.

    - Asymmetric: the grid spans [min(W_g, 0), max(W_g, 0)], s = range / (2^b − 1), z = round(−min / s).
    - Symmetric: z = 2^(b−1) has one more level below than above, and the grid is turned so that this level
      serves the side with the larger magnitude: s = −v / 2^(b−1) with v the value of largest magnitude, so
      v itself is exactly representable (code 0) and **s is negative where v is positive**. Against the
      usual s = max|W_g| / (2^(b−1) − ½) this lowers the error at every width (normal weights, g = 128:
      by 23 % at 2 bits, 7 % at 4), and at 2 bits it uses all four levels. On the smaller side a value
      beyond 2^(b−1) − 1 steps is rounded down to that.

    Scales are rounded to ``scale_dtype`` before the codes are computed, so codes are nearest with respect to
    what is stored. A scale too small for ``scale_dtype`` is rounded away from 0; a group of zeros gets scale
    1 and dequantizes to zeros.

    Args:
        weight: [out, in], any floating-point dtype; arithmetic is in float32.
        bits: 2, 3, 4 or 8.
        group_size: values in a group, a divisor of ``in``; −1: one group a row.
        symmetric: see above.
        scale_dtype: float16, bfloat16 or float32.
        name: what to call the weight in errors.

    Raises:
        BadInput: the group size does not divide ``in``; the weight holds NaN or infinity, or values so large
            that a scale is not representable in ``scale_dtype``.
    """
    if bits not in BITS:
        raise ValueError(f"Weights have 2, 3, 4 or 8 bits, not {bits}.")
    out, width = weight.shape
    groups = number_of_groups(width, group_size, name)
    grouped = weight.float().reshape(out, groups, -1)
    scales, zeros = choose_grid(grouped, bits, symmetric, scale_dtype, name)
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
    """clamp(round(w / s) + z, 0, 2^b − 1) in the dtype of ``values``, with which the others broadcast."""
    return (values / scales.to(values.dtype)).round_().add_(zeros).clamp_(0, 2**bits - 1)


def choose_grid(
    grouped: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of groups of weights, as `quantize_weight` explains.

    Args:
        grouped: float32 [out, groups, group_size].

    Returns:
        Scales [out, groups] in ``scale_dtype``, and zero points, whole numbers in float32 [out, groups].

    Raises:
        BadInput: as `quantize_weight`.
    """
    low, high = grouped.amin(-1), grouped.amax(-1)  # NaN where any value is
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise BadInput(f"The weight of '{name}' holds NaN or infinity; this model cannot be quantized.")
    return grid_between(low, high, bits, symmetric, scale_dtype, name)


def grid_between(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of groups of which the extremes ``low`` and ``high`` are given: [out, groups].

    Returns, and raises, what `choose_grid` does.
    """
    half, top = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scales = torch.where(high > -low, -high, -low) / half
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        # Divided first: the range of a group may be more than float32 holds.
        scales = high / top - low / top
    scales = storable(scales, scale_dtype, name)
    scales[(low == 0) & (high == 0)] = 1
    step = scales.float()
    zeros = torch.full_like(step, half) if symmetric else (-low / step).round_().clamp_(0, top)
    return scales, zeros


def number_of_groups(width: int, group_size: int, name: str) -> int:
    """Groups in a row of ``width`` values.

    Raises:
        BadInput: ``group_size`` does not divide ``width``.
    """
    if group_size == CHANNEL:
        return 1
    if group_size < 1 or width % group_size:
        raise BadInput(
            f"A group size of {group_size} does not divide the input dimension {width} of '{name}'; "
            f"use {_divisors_near(width, group_size)} or channel."
        )
    return width // group_size


def _divisors_near(width: int, wanted: int) -> str:
    """The group sizes a user may have meant: powers of two if any divide ``width``, else any divisors."""
    divisors = [size for size in range(8, width + 1) if width % size == 0]
    powers = [size for size in divisors if size & (size - 1) == 0]
    near = sorted(sorted(powers or divisors or [width], key=lambda size: abs(size - wanted))[:3])
    return ", ".join(map(str, near))


def storable(scales: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Scales rounded to ``dtype``, away from 0 and infinity."""
    stored = scales.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise BadInput(
            f"The weight of '{name}' needs a scale of {float(scales.abs().max()):.2g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use the format compressed-tensors on a bfloat16 model."
        )
    # Below float16's normal numbers steps are coarse: rounded away from 0, so that the grid is not cut
    # short. Below float32's (and bfloat16's) arithmetic may flush to 0, so those become the smallest one.
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    small = scales.abs() < torch.finfo(dtype).smallest_normal
    steps = (scales[small].abs() / smallest).ceil()
    stored[small] = torch.copysign(steps * smallest, scales[small]).to(dtype)
    return stored
