"""The arithmetic of S3T: orders of slices, what deletions leave of them, and how many deletions they last.

A shard has slices 0 to L - 1. An order is a permutation of them; its first i slices are what stage i of a
model is trained on. A deletion kills a slice, and an order lives up to its first dead slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from compress.errors import BadInput

Order = tuple[int, ...]


def cyclic_orders(slices: Sequence[int], count: int) -> list[Order]:
    """Orders by cyclic rotation, for slices that are all equally likely to lose a record.

    Up to L orders are rotations of one another at even distances, so that their first slices, and those at
    every other position, all differ. Beyond L, the orders are spread evenly over the L first slices, and what
    follows each of these is rotated in the same way, and so on.

    Args:
        slices: the L slices.
        count: how many orders.

    Raises:
        BadInput: there are not so many orders of L slices.
    """
    length = len(slices)
    possible = math.factorial(length)
    if count > possible:
        have = "1 slice has 1 order" if length == 1 else f"{length} slices have {possible} orders"
        raise BadInput(f"{have}, not {count}; use --orders {possible}{' or fewer' * (possible > 1)}.")
    if count <= length:
        starts = [number * length // count for number in range(count)]
        return [(*slices[start:], *slices[:start]) for start in starts]
    orders = []
    for start in range(length):
        first, *rest = (*slices[start:], *slices[:start])
        share = count // length + (start < count % length)
        orders += [(first, *behind) for behind in cyclic_orders(rest, share)]
    return orders


def matched_orders(probabilities: Sequence[float], count: int, deletions: float) -> list[Order]:
    """Orders by bipartite matching, for slices whose chances to lose a record are known.

    An order p1..pL is worth Σ_n n·(1 − Σ_{i≤n} p_i)^t: a prefix of n slices counts n times the chance that t
    deletions all miss it. L orders grow by one slice a round. Each round is the assignment of the L slices
    to the L orders that adds the largest worth, where no order gets a slice twice. So every slice has every
    position once, as with rotations.

    Args:
        probabilities: of each slice to be hit by one deletion; they are scaled to the sum 1.
        count: how many of the L orders are wanted; the ones that are worth most come first.
        deletions: t, the number of deletions that are expected among these slices.

    Raises:
        BadInput: more than L orders are wanted, or the probabilities are negative or all 0.
    """
    from scipy.optimize import linear_sum_assignment

    length = len(probabilities)
    if count > length:
        raise BadInput(f"With priors there are at most as many orders as slices, {length}, not {count}.")
    chances = np.asarray(probabilities, dtype=np.float64)
    if (chances < 0).any() or not chances.sum() > 0:
        raise BadInput("Priors are chances: none may be negative, and they may not all be 0.")
    chances = chances / chances.sum()
    orders = np.empty((length, 0), dtype=np.int64)
    hit, worth = np.zeros(length), np.zeros(length)
    for size in range(1, length + 1):
        added = size * np.clip(1 - hit[:, None] - chances[None, :], 0, None) ** deletions
        np.put_along_axis(added, orders, -np.inf, axis=1)  # no slice twice
        rows, columns = linear_sum_assignment(added, maximize=True)
        orders = np.column_stack([orders, columns])
        hit, worth = hit + chances[columns], worth + added[rows, columns]
    best = np.argsort(-worth, kind="stable")[:count]
    return [tuple(int(slice_) for slice_ in orders[row]) for row in best]


def live_length(order: Sequence[int], dead: Collection[int]) -> int:
    """The number of slices in front of the first dead one."""
    return next((position for position, slice_ in enumerate(order) if slice_ in dead), len(order))


def served_prefix(orders: Iterable[Sequence[int]], dead: Collection[int]) -> Order:
    """The longest live prefix of all orders (the first of several); empty where every order is dead."""
    return max((tuple(order[: live_length(order, dead)]) for order in orders), key=len, default=())


def first_slices(orders: Iterable[Sequence[int]], dead: Collection[int]) -> list[int]:
    """The live slices that some order begins with. When the last of them dies, the shard is exhausted."""
    return sorted({order[0] for order in orders} - set(dead))


def deletions_until_empty(shards: int, slices: int, orders: int) -> float:
    """The expected number of deletions until every order of every shard is dead: E = m·L·H(m·min(B, L)).

    Every deletion hits one of the m·L slices with the same probability, also a dead one, so this is how long
    it takes to collect the m·min(B, L) slices that orders begin with. H is the harmonic number.
    """
    harmonic = sum(1 / number for number in range(1, shards * min(orders, slices) + 1))
    return shards * slices * harmonic


def expected_deletions(firsts: Sequence[Sequence[int]], remaining: int) -> tuple[float, float]:
    """How many further records can be deleted, one after the other in a random order, until shards end.

    The exact expectation for the records that are there, of which each can be deleted once. With every
    record at a uniform time in [0, 1], the end comes at the time of the N-th deletion, whose mean is
    E[N] / (remaining + 1); so E[N] follows from the integral of the probability that it has not come yet.
    With many records in each slice this becomes `deletions_until_empty`.

    Args:
        firsts: for each shard that is not exhausted, the number of records in each live first slice.
        remaining: the number of all records that are not deleted.

    Returns:
        The numbers of deletions until the first of these shards is exhausted, and until the last one is; 0
        without any shard.
    """
    from scipy.integrate import quad

    if not firsts:
        return 0.0, 0.0
    sizes = [np.asarray(shard, dtype=np.float64) for shard in firsts]

    def ended(time: float) -> np.ndarray:  # the probability, for each shard
        return np.array([np.prod(-np.expm1(size * math.log1p(-time))) for size in sizes])

    # With thousands of records the end comes soon after 0, where the integral needs more points.
    points = sorted({10.0**-power for power in range(1, 7)})
    first, last = (
        quad(alive, 0, 1 - 1e-12, limit=500, points=points)[0]
        for alive in (lambda time: np.prod(1 - ended(time)), lambda time: 1 - np.prod(ended(time)))
    )
    return (remaining + 1) * float(first), (remaining + 1) * float(last)


def even_parts(count: int, parts: int) -> list[range]:
    """The numbers 0 to count - 1 in runs whose lengths differ by at most 1; the longer ones come first."""
    bounds = [0]
    for number in range(parts):
        bounds.append(bounds[-1] + count // parts + (number < count % parts))
    return [range(start, end) for start, end in itertools.pairwise(bounds)]
