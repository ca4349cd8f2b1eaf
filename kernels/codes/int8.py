"""Weights of LLM.int8()."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127


@dataclass
class Int8Weight:
    """A weight [out, in], or some rows of one, as whole numbers of 8 bits.

    Attributes:
        codes: int8 [out, in], from -127 to 127.
        absmax: the largest magnitude of each row: float32 [out].
        threshold: inputs from this magnitude on are not rounded; 0 rounds all.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    threshold: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """absmax / 127 times the code, in float32 [out, in]."""
        return self.codes.float() * (self.absmax / LARGEST)[:, None]

    def split(self, rows: list[int]) -> list[Int8Weight]:
        """Blocks of so many rows."""
        parts = zip(self.codes.split(rows), self.absmax.split(rows), strict=True)
        return [Int8Weight(codes, absmax, self.threshold) for codes, absmax in parts]

    def same_as(self, other: Int8Weight) -> bool:
        """Whether both hold the same bits."""
        return (
            self.threshold == other.threshold
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.absmax, other.absmax)
        )
