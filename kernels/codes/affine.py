"""Integer codes of other programs: with offsets that are real numbers (mlx), with groups whose columns do not
follow each other (GPTQ in activation order), or with zero points that a file denies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from compress.kernels.codes.weight import LowBitWeight


@dataclass
class AffineWeight(LowBitWeight):
    """A weight [out, in] as integer codes: Ŵ = s · (q − z) + b, with s, z and b of the group of each column.

    Attributes:
        codes: uint8 [out, in], each below 2^bits.
        scales: s, floating point [out, groups], in the dtype they are stored with.
        zeros: z, uint8 [out, groups]; None for 0.
        biases: b, floating point [out, groups]; None for 0.
        groups: the group of each column, int32 [in].
        bits: 2 to 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    biases: torch.Tensor | None
    groups: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """s · (q − z) + b, float32 [out, in]."""
        columns, found = self.groups.long(), self.codes.float()
        if self.zeros is not None:
            found = found - self.zeros.float()[:, columns]
        found = found * self.scales.float()[:, columns]
        return found if self.biases is None else found + self.biases.float()[:, columns]

    def split(self, rows: list[int]) -> list[Self]:
        parts, at = [], 0
        for count in rows:
            parts.append(self.rows(slice(at, at + count)))
            at += count
        return parts

    def rows(self, rows: slice | torch.Tensor) -> Self:
        """Some rows of the weight."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
            biases=None if self.biases is None else self.biases[rows],
        )

    def same_as(self, other: Self) -> bool:
        names = ("codes", "scales", "zeros", "biases", "groups")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return self.bits == other.bits and all(
            mine is theirs
            or (
                (mine is not None and theirs is not None and mine.dtype == theirs.dtype)
                and torch.equal(mine, theirs)
            )
            for mine, theirs in pairs
        )
