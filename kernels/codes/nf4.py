"""Weights in NormalFloat4 (NF4), the 4-bit type of QLoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from compress.kernels.codes.weight import LowBitWeight

BLOCK_SIZE = 64
"""Consecutive weights that share a scale. Rows follow each other, so a block may lie in two of them."""

NESTED_BLOCK_SIZE = 256
"""Consecutive scales that share a scale, with double quantization."""


@dataclass
class NF4Weight(LowBitWeight):
    """A weight [out, in], or some rows of one, in NF4.

    Attributes:
        codes: uint8 [out, in], each below 16.
        absmax: the stored scales of blocks of 64 weights, [blocks]: float32, or uint8 with ``nested``.
        levels: the number that each code stands for, float32 [16].
        dtype: of the original weight. `dequantize` rounds to it, as bitsandbytes does.
        nested: how uint8 scales are decoded: their scales, float32 [ceil(blocks / 256)]; the number that
            each of their codes stands for, float32 [256]; and their mean, float32 [1].
        first: how many weights of the first block lie before these rows.
        first_scale: with ``nested``, how many scales that share the first scale of scales lie before these.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    dtype: torch.dtype
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    first: int = 0
    first_scale: int = 0

    @property
    def scales(self) -> torch.Tensor:
        """The scale of every block, float32 [blocks]."""
        if self.nested is None:
            return self.absmax
        scales, levels, mean = self.nested
        scales = scales.repeat_interleave(NESTED_BLOCK_SIZE)[self.first_scale :][: len(self.absmax)]
        return levels[self.absmax.int()] * scales + mean

    def dequantize(self) -> torch.Tensor:
        """Level times scale, rounded to ``dtype``, as float32 [out, in]."""
        scales = self.scales.repeat_interleave(BLOCK_SIZE)[self.first :][: self.codes.numel()]
        return (self.levels[self.codes.int()] * scales.view(self.codes.shape)).to(self.dtype).float()

    def split(self, rows: list[int]) -> list[Self]:
        scales, parts, at = self.scales, [], self.first
        for codes in self.codes.split(rows):
            absmax = scales[at // BLOCK_SIZE : -(-(at + codes.numel()) // BLOCK_SIZE)]
            part = replace(
                self, codes=codes, absmax=absmax, nested=None, first=at % BLOCK_SIZE, first_scale=0
            )
            parts.append(part)
            at += codes.numel()
        return parts

    def same_as(self, other: Self) -> bool:
        mine, theirs = ((w.codes, w.absmax, w.levels, *(w.nested or ())) for w in (self, other))
        same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
        return same and self.dtype == other.dtype and self.absmax.dtype == other.absmax.dtype


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes as bitsandbytes does: uint8 [out, in] -> uint8 [ceil(out·in / 2), 1].

    The first of two codes is in the high half of a byte. If their number is odd, the last byte is filled up
    with the code of 0.
    """
    flat = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2), value=7)
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)


def unpack_high_first(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_high_first`."""
    flat = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).flatten()
    return flat[: shape[0] * shape[1]].view(shape)
