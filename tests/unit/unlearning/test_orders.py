"""Orders of slices, and how many deletions they last."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.unlearning.parts.orders import (
    cyclic_orders,
    deletions_until_empty,
    even_parts,
    expected_deletions,
    first_slices,
    live_length,
    matched_orders,
    served_prefix,
)
from compress.unlearning.s3t import S3T, orders_of, partition


@settings(max_examples=60)
@given(length=st.integers(1, 7), data=st.data())
def test_cyclic_orders_are_spread_evenly(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(60, math.factorial(length))))
    orders = cyclic_orders(range(length), count)
    assert len(set(orders)) == len(orders) == count
    assert all(sorted(order) == list(range(length)) for order in orders)
    first = Counter(order[0] for order in orders)
    assert max(first.values()) - min(first.values()) <= 1
    assert len(first) == min(count, length)
    if count <= length:  # rotations: every position has other slices in every order
        assert all(len(set(column)) == count for column in zip(*orders, strict=True))
        assert all(order == tuple((order[0] + i) % length for i in range(length)) for order in orders)
    behind = {key: Counter(order[1] for order in orders if order[0] == key) for key in first if length > 1}
    for key, counts in behind.items():  # beyond L, the same holds for what follows each first slice
        assert len(counts) == min(first[key], length - 1)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_all_orders_and_no_more() -> None:
    assert sorted(cyclic_orders(range(4), 24)) == sorted(itertools.permutations(range(4)))
    pairs = Counter(order[:2] for order in cyclic_orders(range(4), 12))
    assert pairs == Counter(itertools.permutations(range(4), 2))
    with pytest.raises(BadInput, match="4 slices have 24 orders, not 25; use --orders 24 or fewer"):
        cyclic_orders(range(4), 25)
    with pytest.raises(BadInput, match=r"1 slice has 1 order, not 6; use --orders 1\."):
        cyclic_orders(range(1), 6)


def worth(order: tuple[int, ...], chances: list[float], deletions: int) -> float:
    """Σ_n n·(1 − Σ_{i≤n} p_i)^t of the paper."""
    total = sum(chances)
    return sum(
        n * max(0.0, 1 - sum(chances[i] for i in order[:n]) / total) ** deletions
        for n in range(1, len(order) + 1)
    )


@settings(max_examples=40)
@given(
    chances=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    deletions=st.integers(0, 12),
)
def test_matching_is_the_best_assignment_of_every_round(chances: list[float], deletions: int) -> None:
    length = len(chances)
    found = matched_orders(chances, length, deletions)
    for size in range(1, length + 1):
        here = sum(worth(order[:size], chances, deletions) for order in found)
        before = [order[: size - 1] for order in found]
        best = max(
            sum(worth((*o, j), chances, deletions) for o, j in zip(before, chosen, strict=True))
            for chosen in itertools.permutations(range(length))
            if all(j not in o for o, j in zip(before, chosen, strict=True))
        )
        assert here == pytest.approx(best, rel=1e-9)
    assert all(len(set(column)) == length for column in zip(*found, strict=True))  # each place once
    worths = [worth(order, chances, deletions) for order in found]
    assert worths == pytest.approx(sorted(worths, reverse=True))
    assert matched_orders(chances, 1, deletions) == found[:1]


def test_matching_puts_the_safest_slices_first() -> None:
    orders = matched_orders([0.6, 0.3, 0.05, 0.05], 1, 20)
    assert orders[0][-2:] == (1, 0)


@pytest.mark.parametrize(
    ("chances", "count", "words"),
    [
        ([0.1, 0.2], 3, "at most as many orders as slices, 2, not 3"),
        ([0.0, 0.0], 1, "may not all be 0"),
        ([0.5, -0.1], 1, "none may be negative"),
    ],
)
def test_priors_that_are_no_chances(chances: list[float], count: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        matched_orders(chances, count, 10)


def test_a_shard_without_likely_records_has_orders_as_if_all_were_equally_likely() -> None:
    options = S3T.Options(shards=4, slices=3, orders=2)
    ids = [f"r{i}" for i in range(24)]
    priors = dict.fromkeys(ids, 0.0) | {"r3": 0.5, "r8": 0.5, "r20": 0.5}
    shards = partition(ids, priors, options, 0)
    unlikely = [slices for slices in shards if not any(priors[name] for names in slices for name in names)]
    assert len(unlikely) == 1
    even = dict.fromkeys(ids, 0.1)
    assert orders_of(unlikely[0], priors, options) == orders_of(unlikely[0], even, options)
    for slices in shards:
        orders = orders_of(slices, priors, options)
        assert len({tuple(order) for order in orders}) == 2
        assert slices in unlikely or orders[0][-1] == 2  # the likely record's slice comes last


def test_expected_deletions_are_those_from_all_shards() -> None:
    """A shard expects its share of them."""
    chances = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.5}
    options = S3T.Options(shards=4, slices=4, orders=4, expected_deletions=20)
    found = orders_of([[name] for name in chances], chances, options)
    assert found == [list(order) for order in matched_orders([*chances.values()], 4, 5)]
    assert found != [list(order) for order in matched_orders([*chances.values()], 4, 20)]


def test_live_prefixes() -> None:
    orders = [(0, 1, 2, 3), (2, 3, 0, 1)]
    assert [live_length(order, {3}) for order in orders] == [3, 1]
    assert served_prefix(orders, {3}) == (0, 1, 2)
    assert served_prefix(orders, {1}) == (2, 3, 0)
    assert served_prefix(orders, {0, 2}) == ()
    assert served_prefix(orders, set()) == orders[0]  # the first of several
    assert first_slices(orders, {0}) == [2]


# --- how many deletions they last ---


def simulated(shards: int, slices: int, orders: int, runs: int) -> np.ndarray:
    """Deletions until every order of every shard has lost its first slice, in so many runs.

    Each deletion hits a slice of the m·L at random, and cuts every order of the shard where the slice is in
    it; nothing here knows that only first slices count.
    """
    places = np.argsort(np.array(cyclic_orders(range(slices), orders)), axis=1)  # [B, L]: slice -> place
    generator = np.random.default_rng(0)
    live = np.full((runs, shards, orders), slices)
    ended, deletion = np.zeros(runs, dtype=int), 0
    while not ended.all():
        deletion += 1
        hit = generator.integers(shards * slices, size=runs)
        shard, slice_ = np.divmod(hit, slices)
        rows = np.arange(runs)
        live[rows, shard] = np.minimum(live[rows, shard], places[:, slice_].T)
        ended[(ended == 0) & (live.max(axis=(1, 2)) == 0)] = deletion
    return ended


@pytest.mark.parametrize(("orders", "expected"), [(1, 68.5), (2, 87.9), (3, 99.5), (6, 119.8), (12, 119.8)])
def test_simulated_deletions_agree_with_the_formula(orders: int, expected: float) -> None:
    formula = deletions_until_empty(5, 6, orders)
    assert formula == pytest.approx(expected, abs=0.06)
    assert simulated(5, 6, orders, 4000).mean() == pytest.approx(formula, rel=0.03)


def test_many_records_in_a_slice_make_the_formula() -> None:
    sizes = [[20_000] * 6] * 5
    assert expected_deletions(sizes, 600_000)[1] == pytest.approx(deletions_until_empty(5, 6, 6), rel=1e-3)
    assert expected_deletions([[20_000]] * 5, 600_000)[1] == pytest.approx(68.5, rel=1e-3)


def test_expected_deletions_of_the_records_that_are_there() -> None:
    firsts, remaining = [[1, 3], [2], [2, 2, 4]], 20
    generator, first, last = np.random.default_rng(0), [], []
    for _ in range(4000):
        time, start, ends = generator.permutation(remaining) + 1, 0, []
        for shard in firsts:
            hits = []
            for size in shard:
                hits.append(time[start : start + size].min())
                start += size
            ends.append(max(hits))
        first.append(min(ends))
        last.append(max(ends))
    found = expected_deletions(firsts, remaining)
    assert found == pytest.approx((np.mean(first), np.mean(last)), rel=0.03)
    assert expected_deletions([[5]], 5) == pytest.approx((1, 1))  # any deletion hits it
    assert expected_deletions([[1] * 4], 4) == pytest.approx((4, 4))  # all must be gone
    assert expected_deletions([], 0) == (0, 0)


@given(count=st.integers(0, 40), parts=st.integers(1, 9))
def test_even_parts(count: int, parts: int) -> None:
    found = even_parts(count, parts)
    assert [number for part in found for number in part] == list(range(count))
    lengths = [len(part) for part in found]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
