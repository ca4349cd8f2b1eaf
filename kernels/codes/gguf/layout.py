"""Where the numbers of a block lie in its bytes, as in the file format of ggml.

A layout is a row of sections. All types are little-endian; lanes of codes are packed like this: a section
with ``bits`` bits of every code takes 8 / bits codes, ``run`` apart from each other, into one byte, the first
into its lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from compress.kernels.codes.gguf.fields import Fields

Found = dict[str, Any]
"""Fields that have been read so far, by name."""


class Section(Protocol):
    """Some bytes of a block."""

    def nbytes(self, size: int) -> int:
        """Bytes of the section in a block of ``size`` weights."""

    def pack(self, fields: Fields) -> torch.Tensor:
        """The bytes, uint8 [N, nbytes]."""

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        """Put what the bytes [N, nbytes] say into ``found``."""


@dataclass(frozen=True)
class Half:
    """A float16 number of the block: ``scale`` or ``minimum``."""

    field: str

    def nbytes(self, size: int) -> int:
        return 2

    def pack(self, fields: Fields) -> torch.Tensor:
        return getattr(fields, self.field).to(torch.float16).view(torch.uint8).view(-1, 2)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        found[self.field] = data.contiguous().view(torch.float16).view(-1).float()


@dataclass(frozen=True)
class Codes:
    """``bits`` bits of every code, from bit ``shift`` of the code on (see the head of this module)."""

    shift: int
    bits: int
    run: int

    def nbytes(self, size: int) -> int:
        return size * self.bits // 8

    def pack(self, fields: Fields) -> torch.Tensor:
        part = (fields.codes >> self.shift) & (2**self.bits - 1)
        lanes = part.view(len(part), -1, 8 // self.bits, self.run)
        packed = lanes[:, :, 0].clone()
        for lane in range(1, 8 // self.bits):
            packed |= lanes[:, :, lane] << (self.bits * lane)
        return packed.flatten(1)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        packed = data.reshape(len(data), -1, 1, self.run)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=data.device)[:, None]
        part = (((packed >> shifts) & (2**self.bits - 1)) << self.shift).flatten(1)
        found["codes"] = found["codes"] | part if "codes" in found else part


@dataclass(frozen=True)
class SignedBytes:
    """Codes as int8; the code 128 is the level 0."""

    def nbytes(self, size: int) -> int:
        return size

    def pack(self, fields: Fields) -> torch.Tensor:
        return fields.codes ^ 128

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        found["codes"] = data ^ 128


class Nibbles:
    """16 pairs of a 4-bit scale and a 4-bit minimum, the scale in the low half (Q2_K)."""

    def nbytes(self, size: int) -> int:
        return 16

    def pack(self, fields: Fields) -> torch.Tensor:
        scales, minima = _both(fields)
        return scales | minima << 4

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        found["group_scales"], found["group_minima"] = (data & 15).short(), (data >> 4).short()


class Sixteen:
    """16 signed scales of 6 bits, stored + 32 (Q3_K): low halves of 8 and 8, then the upper bits by fours."""

    def nbytes(self, size: int) -> int:
        return 12

    def pack(self, fields: Fields) -> torch.Tensor:
        stored = (_scales(fields) + 32).to(torch.uint8)
        low, high = stored & 15, (stored >> 4).view(-1, 4, 4)
        upper = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
        return torch.cat([low[:, :8] | low[:, 8:] << 4, upper], 1)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        low = torch.cat([data[:, :8] & 15, data[:, :8] >> 4], 1)
        high = torch.cat([(data[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
        found["group_scales"] = (low | high << 4).short() - 32


class EightPairs:
    """8 pairs of a 6-bit scale and a 6-bit minimum (Q4_K, Q5_K).

    Four bytes hold the first four scales, four the first four minima. Four more hold the low halves of the
    last four scales and minima, whose upper bits are in the upper bits of the bytes before.
    """

    def nbytes(self, size: int) -> int:
        return 12

    def pack(self, fields: Fields) -> torch.Tensor:
        scales, minima = _both(fields)
        first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
        second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
        return torch.cat([first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], 1)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        first, second, last = data.split(4, 1)
        scales = torch.cat([first & 63, last & 15 | (first >> 6) << 4], 1)
        minima = torch.cat([second & 63, last >> 4 | (second >> 6) << 4], 1)
        found["group_scales"], found["group_minima"] = scales.short(), minima.short()


class Bytes:
    """16 scales in int8 (Q6_K)."""

    def nbytes(self, size: int) -> int:
        return 16

    def pack(self, fields: Fields) -> torch.Tensor:
        return _scales(fields).to(torch.int8).view(torch.uint8)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        found["group_scales"] = data.contiguous().view(torch.int8).short()


class Eight:
    """8 signed scales of 6 bits, stored + 32 (IQ4_XS): upper bits first, then low halves in pairs."""

    def nbytes(self, size: int) -> int:
        return 6

    def pack(self, fields: Fields) -> torch.Tensor:
        stored = (_scales(fields) + 32).to(torch.uint8)
        high, low = (stored >> 4).view(-1, 2, 4), (stored & 15).view(-1, 4, 2)
        upper = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
        return torch.cat([upper, low[..., 0] | low[..., 1] << 4], 1)

    def unpack(self, data: torch.Tensor, found: Found) -> None:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device)
        high = ((data[:, :2, None] >> shifts) & 3).flatten(1)
        low = torch.stack([data[:, 2:] & 15, data[:, 2:] >> 4], -1).flatten(1)
        found["group_scales"] = (low | high << 4).short() - 32


def _scales(fields: Fields) -> torch.Tensor:
    assert fields.group_scales is not None  # a type with this section has them
    return fields.group_scales


def _both(fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
    assert fields.group_minima is not None  # a type with this section has them
    return _scales(fields).to(torch.uint8), fields.group_minima.to(torch.uint8)


def pack(sections: tuple[Section, ...], fields: Fields) -> torch.Tensor:
    """Blocks as bytes, uint8 [N, bytes of a block]."""
    return torch.cat([section.pack(fields) for section in sections], 1)


def unpack(sections: tuple[Section, ...], data: torch.Tensor, size: int) -> Fields:
    """Blocks of ``size`` weights from their bytes, uint8 [N, bytes of a block]."""
    found: Found = {}
    parts = data.split([section.nbytes(size) for section in sections], 1)
    for section, part in zip(sections, parts, strict=True):
        section.unpack(part, found)
    return Fields(**found)
