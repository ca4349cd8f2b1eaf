"""Widths under a budget: it is met, something stays everywhere, and the best units do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.pruning.parts.allocation import (
    Scores,
    Units,
    Widths,
    best,
    check_ratio,
    even_widths,
    floor_widths,
    rank,
    rank_apart,
    spread_widths,
    standardised,
)
from compress.pruning.parts.width import Kept


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Units], list[Scores], float, int]:
    """Layers of different widths, some without a block, scores, a ratio that is possible, and a multiple."""
    multiple = draw(st.sampled_from([1, 1, 3, 8]))
    costs = draw(st.integers(1, 400)), draw(st.integers(1, 60))
    layers = [
        Units(groups, neurons, costs[0] if groups else 0, costs[1] if neurons else 0)
        for groups, neurons in draw(
            st.lists(
                st.tuples(st.integers(0, 5), st.sampled_from([0, *range(8, 30)])), min_size=1, max_size=5
            )
        )
    ]
    layers = [layer for layer in layers if layer.cost] or [Units(2, 9, *costs)]
    least = sum(layer.least_cost(multiple) for layer in layers)
    most = 1 - least / sum(layer.cost for layer in layers)
    ratio = draw(st.floats(0, 1)) * most
    seed = draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)

    def random(count: int) -> torch.Tensor:
        values = torch.randn(count, generator=generator, dtype=torch.float64)
        return values.round() if seed == 0 else values  # some equal ones

    return layers, [Scores(random(u.groups), random(u.neurons)) for u in layers], ratio, multiple


def spent(units: list[Units], kept: list[Kept]) -> float:
    return sum(
        len(k.groups) * u.group_cost + len(k.neurons) * u.neuron_cost
        for u, k in zip(units, kept, strict=True)
    )


def check(units: list[Units], scores: list[Scores], kept: list[Kept], multiple: int) -> None:
    for layer, of, stay in zip(units, scores, kept, strict=True):
        for values, indices, count in (
            (of.groups, stay.groups, layer.groups),
            (of.neurons, stay.neurons, layer.neurons),
        ):
            assert indices.tolist() == sorted(set(indices.tolist()))
            assert len(indices) >= min(count, 1)
            gone = torch.ones(count, dtype=torch.bool)
            gone[indices] = False
            if len(indices) and gone.any():
                assert values[indices].min() >= values[gone].max()
        assert len(stay.neurons) == layer.neurons or len(stay.neurons) % multiple == 0


@given(models())
@settings(max_examples=60)
def test_a_ranking_meets_the_budget_within_one_unit(model: tuple) -> None:
    units, scores, ratio, multiple = model
    check_ratio(units, ratio, multiple)
    kept = rank(scores, units, ratio, multiple)
    largest = max(max(u.group_cost, min(multiple, u.neurons) * u.neuron_cost) for u in units)

    assert abs(spent(units, kept) - (1 - ratio) * sum(u.cost for u in units)) <= largest / 2 + 1e-6
    check(units, scores, kept, multiple)


@given(models(), st.integers(0, 6))
@settings(max_examples=60)
def test_rankings_apart_meet_it_with_neurons_or_refuse(model: tuple, removed: int) -> None:
    units, scores, ratio, multiple = model
    budget = (1 - ratio) * sum(u.cost for u in units)
    one = max(multiple * u.neuron_cost for u in units)
    try:
        kept = rank_apart(scores, units, ratio, removed, multiple)
    except BadInput:
        heads = sum(u.groups for u in units) - removed
        layers = sum(u.groups > 0 for u in units)
        for_neurons = budget - heads * max(u.group_cost for u in units)
        least = sum(min(multiple, u.neurons) * u.neuron_cost for u in units)
        assert heads < layers or not least <= for_neurons <= sum(u.neurons * u.neuron_cost for u in units)
        return
    assert sum(len(k.groups) for k in kept) == sum(u.groups for u in units) - removed
    assert abs(spent(units, kept) - budget) <= 1.5 * one + 1e-6
    check(units, scores, kept, multiple)


@given(models())
@settings(max_examples=60)
def test_every_layer_loses_the_same_share(model: tuple) -> None:
    units, scores, ratio, multiple = model
    try:
        widths = even_widths(units, ratio, multiple)
    except BadInput:
        return
    kept = best(scores, widths)
    for layer, width in zip(units, widths, strict=True):
        cost = width.groups * layer.group_cost + width.neurons * layer.neuron_cost
        one = multiple * layer.neuron_cost if layer.neurons else layer.group_cost
        assert abs(cost - (1 - ratio) * layer.cost) <= one / 2 + 1e-6
    check(units, scores, kept, multiple)


@given(models())
@settings(max_examples=20)
def test_nothing_goes_at_ratio_0(model: tuple) -> None:
    units, scores, _, multiple = model
    all_of_it = [Widths(u.groups, u.neurons) for u in units]
    assert even_widths(units, 0.0, multiple) == all_of_it
    assert floor_widths(units, 0.0, multiple) == all_of_it
    assert spread_widths(units, 0.0, multiple) == all_of_it
    for kept in (rank(scores, units, 0.0, multiple), rank_apart(scores, units, 0.0, 0, multiple)):
        assert [(len(k.groups), len(k.neurons)) for k in kept] == all_of_it


def test_a_share_that_is_a_whole_number_of_units_goes_whole():
    """0.58 * 50 is 28.999999999999996 in floating point."""
    units = [Units(50, 100, 4.0, 1.0)]
    assert floor_widths(units, 0.58) == [Widths(50 - 29, 100 - 58)]
    assert floor_widths(units, 0.29) == [Widths(50 - 14, 100 - 29)]


LLAMA = [Units(3, 1536, 294912.0, 1728.0)] * 4


def test_a_plan_for_a_ranking_has_the_right_sum_and_different_layers():
    widths = spread_widths(LLAMA, 0.2)
    cost = sum(w.groups * 294912 + w.neurons * 1728 for w in widths)
    assert abs(cost - 0.8 * sum(u.cost for u in LLAMA)) <= len(LLAMA) * 1728 / 2
    assert len(set(widths)) > 1


@pytest.mark.parametrize("ratio", [0.005, 0.01, 0.02, 0.04, 0.3])
def test_a_plan_for_a_ranking_says_whether_layers_will_differ(ratio: float):
    """A small share of every layer alone is less than a step of 64 neurons, but that of all is not."""
    one = Units(3, 1536, 294912.0, 1728.0)
    units, generator = [one] * 30, torch.Generator().manual_seed(0)
    scores = [Scores(torch.full((3,), 9.0), torch.randn(1536, generator=generator)) for _ in units]
    planned, kept = spread_widths(units, ratio, 64), rank(scores, units, ratio, 64)
    cost = sum(w.groups * one.group_cost + w.neurons * one.neuron_cost for w in planned)
    assert abs(cost - (1 - ratio) * 30 * one.cost) <= 64 * one.neuron_cost
    assert len(set(planned)) > 1
    assert len({(len(k.groups), len(k.neurons)) for k in kept}) > 1


def test_even_widths_take_heads_where_neurons_alone_will_not_do():
    assert even_widths(LLAMA, 0.1)[0].groups == 3
    assert even_widths(LLAMA, 0.3)[0].groups == 2
    assert even_widths(LLAMA, 0.3, 64)[0].neurons % 64 == 0
    assert even_widths(LLAMA, 0.3, removed_groups=0)[0] == (3, round(1536 - 0.3 * LLAMA[0].cost / 1728))


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: check_ratio(LLAMA, 0.95, 1), "at most 0.9"),
        (lambda: check_ratio(LLAMA, 0.1, 2048), "fewer than the width_multiple 2048"),
        (lambda: spread_widths(LLAMA, 0.1, 1, 9), "At most 8 of the 12"),
        (lambda: spread_widths(LLAMA, 0.01, 1, 8), "change remove_heads or ratio"),
        (lambda: even_widths(LLAMA, 0.8, 1, 0), "when it loses 0 of its heads"),
    ],
)
def test_what_cannot_be(action, words: str):
    with pytest.raises(BadInput, match=words):
        action()


def test_equal_scores_are_worth_nothing():
    assert standardised(torch.full((5,), 3.0)).tolist() == [0] * 5
    values = standardised(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert float(values.mean()) == pytest.approx(0)
    assert float(values.std()) == pytest.approx(1)
