"""Our own integer codes as blocks of a GGUF file, without rounding weights again."""

from __future__ import annotations

import torch

from compress.kernels.codes.gguf import TYPES, BlockType
from compress.kernels.codes.gguf.fields import Fields
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight
from compress.storage.formats.base import Format, IntegerFormat

ROOM = (("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127))
"""Types whose blocks of 32 weights have one scale, and the levels that they have."""


def exact_type(form: Format, width: int) -> BlockType | None:
    """The smallest type that holds every code q - z of a format; None if there is none.

    A weight of ours is s (q - z). Of a format with zero points of its own, q - z is anything between
    -(2^b - 1) and 2^b - 1, so that the type has more bits than the codes.

    Args:
        form: the format of the weight.
        width: of its rows.
    """
    if not isinstance(form, IntegerFormat):
        return None
    group = width if form.group_size == CHANNEL else form.group_size
    if group % 32:
        return None
    if form.symmetric:
        low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    else:
        low, high = -(2**form.bits - 1), 2**form.bits - 1
    return next((TYPES[name] for name, least, most in ROOM if least <= low and high <= most), None)


def as_fields(weight: QuantizedWeight, kind: BlockType) -> Fields:
    """The same codes in blocks of ``kind``, which `exact_type` gave. Scales are rounded to float16."""
    out, groups = weight.scales.shape
    size = weight.codes.shape[1] // groups
    levels = weight.codes.view(out, groups, size).short() - weight.zeros[..., None].short()
    codes = (levels - kind.levels.lowest).to(torch.uint8).view(-1, kind.size)
    scales = weight.scales.to(torch.float16).float()
    return Fields(codes, scales.repeat_interleave(size // kind.size, 1).flatten())


def exact(weight: QuantizedWeight) -> bool:
    """Whether all scales are numbers of float16, so that `as_fields` changes no weight."""
    scales = weight.scales.float()
    return bool((scales.to(torch.float16).float() == scales).all())
