"""The whole numbers that codes stand for."""

from __future__ import annotations

from functools import cache

import torch


class Levels:
    """Levels in ascending order; a code is the place of its level.

    Args:
        values: the levels, from -128 to 127 where they are not evenly spaced.
    """

    def __init__(self, values: tuple[int, ...]) -> None:
        self.values = values
        self.lowest, self.highest = values[0], values[-1]
        self.even = self.highest - self.lowest == len(values) - 1

    def __len__(self) -> int:
        return len(self.values)

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels of codes, float32 in the shape of ``codes``."""
        if self.even:
            return codes.float().add_(self.lowest)
        return torch.tensor(self.values, dtype=torch.float32, device=codes.device)[codes.int()]

    def nearest_(self, values: torch.Tensor) -> torch.Tensor:
        """Replace real numbers, float32 or float64, by the nearest levels, in place."""
        if self.even:
            return values.round_().clamp_(self.lowest, self.highest)
        places = values.mul_(2).floor_().clamp_(-HALVES, HALVES - 1).add_(HALVES).int()
        table = _nearest(self.values, values.device).to(values.dtype)
        return values.copy_(table.index_select(0, places.flatten()).view(values.shape))

    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes of numbers that are levels, uint8 in the shape of ``levels``."""
        if self.even:
            return (levels - self.lowest).to(torch.uint8)
        table = torch.tensor(self.values, dtype=torch.float32, device=levels.device)
        return torch.searchsorted(table, levels.float().contiguous(), out_int32=True).to(torch.uint8)


HALVES = 256
"""The nearest of uneven levels is looked up by twice the number, rounded down: the middles between whole
numbers are multiples of one half."""


@cache
def uniform(count: int, zero: int) -> Levels:
    """Levels with equal distances: ``zero`` is the code of the level 0."""
    return Levels(tuple(range(-zero, count - zero)))


@cache
def _nearest(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The nearest levels of the numbers from -128 in steps of one half, float32; in the middle the upper."""
    table = torch.tensor(values, dtype=torch.float32)
    numbers = torch.arange(-HALVES, HALVES) / 2
    return table[torch.searchsorted((table[1:] + table[:-1]) / 2, numbers, right=True)].to(device)
