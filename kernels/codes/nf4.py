"""NormalFloat4 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_SIZE = 64
"""Weights that share a scale: they follow each other in memory, across the ends of rows."""

NESTED_BLOCK_SIZE = 256
"""Scales that share a scale, where scales are quantized themselves."""


@dataclass
class NF4Weight:
    """A weight [out, in], or some rows of one, in NF4.

    Attributes:
        codes: uint8 [out, in], each below 16.
        absmax: the scales of blocks of 64 as they are stored: float32, or uint8 with ``nested``.
        levels: float32 [16].
        dtype: what `dequantize` rounds to, as the library does: that of the weight before.
        nested: of uint8 scales: float32 scales [n], float32 levels [256], and the mean [1].
        first: weights of the first block that lie before these rows.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    dtype: torch.dtype
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def scales(self) -> torch.Tensor:
        """Of every block, float32."""
        if self.nested is None:
            return self.absmax
        scales, levels, mean = self.nested
        scales = scales.repeat_interleave(NESTED_BLOCK_SIZE)[: len(self.absmax)]
        return levels[self.absmax.int()] * scales + mean

    def dequantize(self) -> torch.Tensor:
        """Level times scale, rounded to ``dtype``, in float32 [out, in]."""
        scales = self.scales.repeat_interleave(BLOCK_SIZE)[self.first :][: self.codes.numel()]
        return (self.levels[self.codes.int()] * scales.view(self.codes.shape)).to(self.dtype).float()

    def split(self, rows: list[int]) -> list[NF4Weight]:
        """Blocks of so many rows."""
        scales, parts, at = self.scales, [], self.first
        for codes in self.codes.split(rows):
            absmax = scales[at // BLOCK_SIZE : -(-(at + codes.numel()) // BLOCK_SIZE)]
            parts.append(NF4Weight(codes, absmax, self.levels, self.dtype, None, at % BLOCK_SIZE))
            at += codes.numel()
        return parts

    def same_as(self, other: NF4Weight) -> bool:
        """Whether both hold the same bits."""
        mine, theirs = ((w.codes, w.absmax, w.levels, *(w.nested or ())) for w in (self, other))
        same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
        return same and self.dtype == other.dtype and self.absmax.dtype == other.absmax.dtype


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] below 16 -> uint8 [ceil(out·in / 2), 1], the first of two in the high half; the last
    may stand beside the code of 0."""
    flat = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2), value=7)
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)


def unpack_high_first(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_high_first`."""
    flat = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).flatten()
    return flat[: shape[0] * shape[1]].view(shape)
