"""The multiple-choice knapsack: one type for each tensor, so that the loss is least and the bytes suffice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_UNITS = 1 << 22
"""Units of bytes that the table of the dynamic programme may have columns for."""


def choose(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], capacity: int
) -> list[int] | None:
    """Choose one type for each tensor by dynamic programming over the bytes that are spent.

    Bytes are counted in units of the greatest common divisor of all differences between types, which is large
    because tensors are; so the choice is the best there is. Only where there would be more than `MOST_UNITS`
    of them, the unit is made larger and differences are rounded up to it: the choice then fits, and a better
    one could use at most one unit per tensor more.

    Args:
        losses: for every tensor, the loss that it causes in each of its types.
        sizes: for every tensor, its bytes in each of its types.
        capacity: bytes that all tensors together may take.

    Returns:
        For every tensor the index of its type, or None if not even the smallest types fit.
    """
    least = [min(each) for each in sizes]
    room = capacity - sum(least)
    if room < 0:
        return None
    extra = [[size - smallest for size in each] for each, smallest in zip(sizes, least, strict=True)]
    most = sum(max(each) for each in extra)
    room = min(room, most)
    unit = math.gcd(*(size for each in extra for size in each)) or 1
    unit = max(unit, -(-room // MOST_UNITS))
    units = room // unit
    weights = [[-(-size // unit) for size in each] for each in extra]

    best = np.zeros(units + 1)  # units -> the least loss of the tensors so far in at most so many
    choices = []
    for loss, weight in zip(losses, weights, strict=True):
        found = np.full(units + 1, np.inf)
        choice = np.zeros(units + 1, dtype=np.uint8)
        for index, (value, count) in enumerate(zip(loss, weight, strict=True)):
            if count > units:
                continue
            candidate = best[: units + 1 - count] + value
            better = candidate < found[count:]
            found[count:][better] = candidate[better]
            choice[count:][better] = index
        best = found
        choices.append(choice)

    chosen, left = [], units
    for choice, weight in zip(reversed(choices), reversed(weights), strict=True):
        chosen.append(int(choice[left]))
        left -= weight[chosen[-1]]
    return chosen[::-1]
