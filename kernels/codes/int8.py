"""The 8-bit weights of LLM.int8()."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from compress.kernels.codes.weight import LowBitWeight

LARGEST = 127
"""The largest code."""


@dataclass
class Int8Weight(LowBitWeight):
    """A weight [out, in], or some rows of one, as 8-bit integers.

    Attributes:
        codes: int8 [out, in], from −127 to 127.
        absmax: the largest magnitude of each row, float32 [out].
        threshold: inputs of at least this magnitude are not rounded; 0 rounds all inputs.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    threshold: float

    def dequantize(self) -> torch.Tensor:
        """absmax / 127 · code, float32 [out, in]."""
        return self.codes.float() * (self.absmax / LARGEST)[:, None]

    def split(self, rows: list[int]) -> list[Self]:
        parts = zip(self.codes.split(rows), self.absmax.split(rows), strict=True)
        return [replace(self, codes=codes, absmax=absmax) for codes, absmax in parts]

    def same_as(self, other: Self) -> bool:
        return (
            self.threshold == other.threshold
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.absmax, other.absmax)
        )
