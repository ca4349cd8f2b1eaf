"""The table of types, and how a whole weight becomes blocks and comes back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from compress.errors import BadInput, unknown
from compress.kernels.codes.gguf.fields import Fields
from compress.kernels.codes.gguf.layout import (
    Bytes,
    Codes,
    Eight,
    EightPairs,
    Half,
    Nibbles,
    Section,
    SignedBytes,
    Sixteen,
    pack,
    unpack,
)
from compress.kernels.codes.gguf.levels import Levels, uniform
from compress.kernels.codes.gguf.search import GroupScales, choose_fields

CHUNK = 2**20
"""Weights that are decoded together. Only memory and speed depend on it."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen levels of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors.

    Attributes:
        name: what ggml calls it, such as ``Q4_K``.
        number: what stands for it in a file.
        size: weights of a block.
        nbytes: bytes of a block.
        dtype: of the numbers, in a type without blocks (F32, F16, BF16).
    """

    name: str
    number: int
    size: int
    nbytes: int
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> float:
        """Bits of a weight, everything counted."""
        return 8 * self.nbytes / self.size

    def fits(self, width: int) -> bool:
        """Whether rows of ``width`` weights can have this type."""
        return width % self.size == 0

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights.

        Raises:
            BadInput: rows of this width cannot have this type.
        """
        if not self.fits(width):
            raise BadInput(
                f"Rows of {width} weights cannot have the type {self.name}, whose blocks have {self.size}."
            )
        return width // self.size * self.nbytes

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Round a weight to the blocks with the least error.

        Args:
            weight: [out, in], any floating-point dtype.
            importance: what the squared error of each input channel counts, such as the mean square of the
                inputs, [in]; or of each weight, [out, in]. All count alike without it, or where it is 0.

        Returns:
            uint8 [out, bytes of a row].

        Raises:
            BadInput: rows of this width cannot have this type, the weight holds NaN or infinity, or values
                that are too large for it.
        """
        out, width = weight.shape
        nbytes = self.row_bytes(width)
        if not bool(weight.isfinite().all()):
            raise BadInput("A weight holds NaN or infinity; it cannot be written in blocks.")
        if self.dtype is not None:
            return as_bytes(weight, self.dtype)
        return pack(self.sections, self.round(weight, importance)).view(out, nbytes)

    def round(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Fields:
        """As `encode`, as fields. The blocks of a row follow one another.

        Raises:
            BadInput: values are too large for the scales of this type, which are float16.
        """
        form, minima, groups = FORMS[self.name][1:]
        found = choose_fields(weight, importance, self.size, form, groups, minima)
        for stored in (found.scale, found.minimum):
            if stored is not None and bool((stored.abs() >= torch.finfo(torch.float16).max).any()):
                raise BadInput(f"A weight holds values too large for {self.name}.")
        return found

    def pack(self, fields: Fields) -> torch.Tensor:
        """Fields as blocks, uint8 [N, nbytes]."""
        return pack(self.sections, fields)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Blocks, uint8 [..., any number of whole blocks], as fields."""
        return unpack(self.sections, blocks.reshape(-1, self.nbytes), self.size)

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """The real numbers of blocks, uint8 [out, bytes of a row] -> float32 [out, in]."""
        if self.dtype is not None:
            return blocks.contiguous().view(self.dtype).float()
        rows = max(1, CHUNK * self.nbytes // self.size // max(1, blocks.shape[1]))
        parts = [self.values(self.unpack(part)).view(len(part), -1) for part in blocks.split(rows)]
        return torch.cat(parts) if parts else blocks.new_zeros((0, 0), dtype=torch.float32)

    def values(self, fields: Fields) -> torch.Tensor:
        """The real numbers of fields, float32 [N, size]."""
        step, offset = fields.grid()
        levels = self.levels.of(fields.codes).view(*step.shape, -1)
        values = step[..., None] * levels
        if offset is not None:
            values += offset[..., None]
        return values.view(len(fields.codes), -1)

    @property
    def sections(self) -> tuple[Section, ...]:
        return FORMS[self.name][0]

    @property
    def levels(self) -> Levels:
        """The whole numbers that codes stand for."""
        return FORMS[self.name][1]

    @cached_property
    def group(self) -> int:
        """Weights that share a step."""
        scales = FORMS[self.name][3]
        return self.size if scales is None else self.size // scales.groups


def as_bytes(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [out, in] in a floating-point dtype, as bytes.

    Raises:
        BadInput: some are too large for it.
    """
    stored = weight.to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise BadInput(f"A weight holds values too large for {str(dtype).removeprefix('torch.')}.")
    return stored.view(torch.uint8).view(len(stored), -1)


D, M = Half("scale"), Half("minimum")
LOW = Codes(0, 4, 16)

FORMS: dict[str, tuple[tuple[Section, ...], Levels, bool, GroupScales | None]] = {
    "Q4_0": ((D, LOW), uniform(16, 8), False, None),
    "Q4_1": ((D, M, LOW), uniform(16, 0), True, None),
    "Q5_0": ((D, Codes(4, 1, 1), LOW), uniform(32, 16), False, None),
    "Q5_1": ((D, M, Codes(4, 1, 1), LOW), uniform(32, 0), True, None),
    "Q8_0": ((D, SignedBytes()), uniform(256, 128), False, None),
    "IQ4_NL": ((D, LOW), Levels(IQ4), False, None),
    "Q2_K": ((Nibbles(), Codes(0, 2, 32), D, M), uniform(4, 0), True, GroupScales(16, 0, 15)),
    "Q3_K": (
        (Codes(2, 1, 32), Codes(0, 2, 32), Sixteen(), D),
        uniform(8, 4),
        False,
        GroupScales(16, -32, 31),
    ),
    "Q4_K": ((D, M, EightPairs(), Codes(0, 4, 32)), uniform(16, 0), True, GroupScales(8, 0, 63)),
    "Q5_K": (
        (D, M, EightPairs(), Codes(4, 1, 32), Codes(0, 4, 32)),
        uniform(32, 0),
        True,
        GroupScales(8, 0, 63),
    ),
    "Q6_K": (
        (Codes(0, 4, 64), Codes(4, 2, 32), Bytes(), D),
        uniform(64, 32),
        False,
        GroupScales(16, -128, 127),
    ),
    "IQ4_XS": ((D, Eight(), LOW), Levels(IQ4), False, GroupScales(8, -32, 31)),
}
"""Name -> sections of a block, levels, whether it has a minimum, and scales of groups."""

TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, torch.float32),
        BlockType("F16", 1, 1, 2, torch.float16),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ4_XS", 23, 256, 136),
        BlockType("BF16", 30, 1, 2, torch.bfloat16),
    )
}
"""Name -> type. Whole numbers and types that are not here cannot be read or written."""


def find_type(name: str) -> BlockType:
    """The type of that name, in any case.

    Raises:
        BadInput: there is none.
    """
    if (found := TYPES.get(name.upper())) is None:
        raise unknown("GGUF type", name, TYPES)
    return found
