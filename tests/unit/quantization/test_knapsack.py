"""The knapsack against every combination there is."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.quantization.parts import knapsack
from compress.quantization.parts.knapsack import choose

TENSORS = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1000)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def total(choices: tuple[int, ...], values: list[list[int]]) -> int:
    return sum(each[index] for each, index in zip(values, choices, strict=True))


@given(TENSORS, st.integers(0, 300), st.sampled_from([1, 4, 648]))
def test_no_combination_is_better(tensors: list[list[tuple[int, int]]], capacity: int, unit: int) -> None:
    sizes = [[size * unit for size, _ in each] for each in tensors]
    losses = [[loss for _, loss in each] for each in tensors]
    fitting = [
        total(choices, losses)
        for choices in product(*(range(len(each)) for each in tensors))
        if total(choices, sizes) <= capacity * unit
    ]
    found = choose(losses, sizes, capacity * unit)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert total(tuple(found), sizes) <= capacity * unit
    assert total(tuple(found), losses) == min(fitting)


def test_it_is_better_than_going_by_gain_per_byte() -> None:
    """The first step with the largest gain per byte leaves no room for the best one."""
    losses, sizes = [[10.0, 4.0], [10.0, 0.0]], [[0, 5], [0, 10]]
    assert choose(losses, sizes, 10) == [0, 1]


@pytest.mark.parametrize("most", [1, 10, 100])
def test_coarse_units_still_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST_UNITS", most)
    sizes = [[7 * bits + index % 3 for bits in (2, 3, 4, 8)] for index in range(20)]
    losses = [[float((index + 1) * 4**-bits) for bits in (2, 3, 4, 8)] for index in range(20)]
    found = choose(losses, sizes, 20 * 7 * 4)
    assert found is not None
    assert sum(each[index] for each, index in zip(sizes, found, strict=True)) <= 20 * 7 * 4
