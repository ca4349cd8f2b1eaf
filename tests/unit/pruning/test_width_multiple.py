"""The widths that pruning keeps by default: multiples that quantization can use, at the asked share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.pruning.kprune import affordable
from compress.pruning.parts.allocation import (
    Scores,
    Units,
    Widths,
    even_widths,
    floor_widths,
    head_step,
    rank,
    rank_apart,
    removal,
    spread_widths,
)
from compress.pruning.parts.options import WidthMultiple

WIDE = [Units(12, 1536, 4 * 384 * 32, 3 * 384, 32)] * 6  # as MiniLM: two heads make 64 channels


@pytest.mark.parametrize(
    ("neurons", "multiple"),
    [(11008, 64), (1536, 64), (512, 64), (511, 32), (256, 32), (128, 16), (48, 8), (4, 4)],
)
def test_the_default_multiple(neurons: int, multiple: int) -> None:
    options = WidthMultiple()
    assert options.multiple([neurons]) == multiple
    assert options.multiple([8, neurons, 0]) == max(multiple, 8)  # the widest layer counts
    assert WidthMultiple(width_multiple=3).multiple([neurons]) == 3


def test_a_model_without_neurons_has_a_multiple() -> None:
    assert WidthMultiple().multiple([0, 0]) == WidthMultiple().multiple([]) == 1


@pytest.mark.parametrize(
    ("multiple", "heads", "channels", "step"),
    [
        (64, 3, 192, 1),  # SmolLM2
        (64, 12, 32, 2),  # MiniLM
        (64, 32, 96, 2),  # Phi-3
        (64, 32, 80, 4),  # OPT-2.7b
        (64, 12, 26, 4),  # all heads together are 312 wide, a multiple of 8 only
        (64, 3, 32, 1),  # 96, a multiple of 32 only
        (1, 12, 26, 1),
        (64, 0, 0, 1),
    ],
)
def test_heads_that_go_together(multiple: int, heads: int, channels: int, step: int) -> None:
    assert head_step(multiple, heads, channels) == step


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("how", ["rank", "rank_apart", "even", "spread", "floor"])
def test_widths_are_multiples_and_the_share_is_met(how: str, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [Scores(*(torch.rand(n, generator=generator) for n in (12, 1536))) for _ in WIDE]
    found: Any = {
        "rank": lambda: rank(scores, WIDE, ratio, 64),
        "rank_apart": lambda: rank_apart(scores, WIDE, ratio, None, 64),
        "even": lambda: even_widths(WIDE, ratio, 64),
        "spread": lambda: spread_widths(WIDE, ratio, 64),
        "floor": lambda: floor_widths(WIDE, ratio, 64),
    }[how]()
    kept = [each.kept if isinstance(each, Widths) else each for each in found]
    for layer in kept:
        assert len(layer.groups) * 32 % 64 == 0
        assert len(layer.neurons) % 64 == 0
        assert min(len(layer.groups), len(layer.neurons)) > 0
    details = removal(kept, WIDE)[1]
    step = 64 * WIDE[0].neuron_cost / WIDE[0].cost
    allowed = {"floor": 2 * 4 * 384 * 32 / WIDE[0].cost + step, "even": step}.get(how, step / 2)
    assert abs(details["ratio_removed"] - ratio) <= allowed


def test_a_number_of_heads_that_is_given_is_kept() -> None:
    scores = [Scores(torch.rand(12), torch.rand(1536)) for _ in WIDE]
    for kept in (rank_apart(scores, WIDE, 0.2, 7, 64), spread_widths(WIDE, 0.2, 64, 7)):
        groups = [each.groups if isinstance(each, Widths) else len(each.groups) for each in kept]
        assert sum(groups) == 6 * 12 - 7


def test_kprune_drops_units_in_bundles() -> None:
    scores = [torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([4.0, 5.0, 0.0, 7.0, 6.0])]
    found = affordable(scores, [10, 1], 26, [2, 2])
    assert [mask.tolist() for mask in found] == [[True, False, False, True], [True, True, False, True, True]]
    assert int(sum(mask.sum() * cost for mask, cost in zip(found, [10, 1], strict=True))) <= 26
    always = affordable([torch.tensor([torch.inf, 1.0])], [10], 0, [1])[0]
    assert always.tolist() == [True, False]
