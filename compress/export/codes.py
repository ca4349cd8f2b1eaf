"""Put integer codes onto another grid that has the same points, without rounding a weight again."""

from __future__ import annotations

from dataclasses import replace

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight
from compress.storage.formats.base import Format

ROUNDED = "Scales are rounded to {dtype}, which changes each by at most {share:.2%}."


def integer_codes(form: Format) -> bool:
    """Whether a format stores integer codes with scales and zero points."""
    return form.name in ("compressed-tensors", "gptq", "awq", "mlx") and not hasattr(form, "type")


def fewest_bits(bits: int, widths: tuple[int, ...]) -> int | None:
    """The smallest of some widths that holds codes of ``bits`` bits; None if none does."""
    return min((width for width in widths if width >= bits), default=None)


def largest_group(length: int, sizes: tuple[int, ...]) -> int | None:
    """The largest of some group sizes into which groups of ``length`` inputs can be cut; None if none is."""
    return max((size for size in sizes if length % size == 0), default=None)


def widened(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """The same weight in codes of more bits. Symmetric zero points move to the middle of the wider range."""
    if bits == weight.bits:
        return weight
    shift = 2 ** (bits - 1) - 2 ** (weight.bits - 1) if weight.symmetric else 0
    return replace(weight, codes=weight.codes + shift, zeros=weight.zeros + shift, bits=bits)


def regrouped(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same weight with smaller groups, which repeat the scale of the group that they are a part of."""
    if group_size == weight.group_size:
        return weight
    width = weight.shape[1] if group_size == CHANNEL else group_size
    parts = weight.shape[1] // weight.scales.shape[1] // width
    return replace(
        weight,
        scales=weight.scales.repeat_interleave(parts, dim=1),
        zeros=weight.zeros.repeat_interleave(parts, dim=1),
        group_size=group_size,
    )


def with_scales(
    weight: QuantizedWeight, dtype: torch.dtype, name: str, notes: dict[str, None], instead: str
) -> QuantizedWeight:
    """The same weight with scales in another dtype; ``notes`` gets a sentence if that rounds them.

    Raises:
        BadInput: a scale is too large or too small for the dtype. ``instead`` says what works.
    """
    scales = weight.scales.to(dtype)
    before, after = weight.scales.float(), scales.float()
    if not torch.equal(before, after):
        shown = str(dtype).removeprefix("torch.")
        off = ((after - before) / before).abs().where(before != 0, 0.0).flatten()
        if not off.max() <= torch.finfo(dtype).eps:
            worst = float(before.flatten()[off.argmax()])
            raise BadInput(f"A scale of '{name}' is {worst:.2g}, which {shown} cannot hold; {instead}.")
        # Numbers with all their digits change by half of that, those near the smallest ones by more.
        notes[ROUNDED.format(dtype=shown, share=torch.finfo(dtype).eps)] = None
    return replace(weight, scales=scales)
