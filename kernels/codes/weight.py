"""What all kinds of low-bit weights have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch


class LowBitWeight(ABC):
    """A weight [out, in], or some rows of one, as low-bit codes and their scales."""

    codes: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The real numbers, float32 [out, in]."""

    @abstractmethod
    def split(self, rows: list[int]) -> list[Self]:
        """Parts with these numbers of consecutive rows, which must add up to ``out``."""

    @abstractmethod
    def same_as(self, other: Self) -> bool:
        """Whether both hold the same bits."""
