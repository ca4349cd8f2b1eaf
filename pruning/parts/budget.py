"""Which units of the sublayers fit into a budget of FLOPs: in a plan, and by their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.pruning.parts.allocation import bundles_of, head_step
from compress.pruning.parts.knowledge import Sublayer
from compress.pruning.parts.options import WidthMultiple
from compress.pruning.parts.width import Kept


def steps_of(sublayers: Sequence[Sublayer], options: WidthMultiple) -> list[int]:
    """How many units of each sublayer stay or go together."""
    multiple = options.multiple(len(each.channels) for each in sublayers if each.name == "mlp")
    return [
        multiple if each.name == "mlp" else head_step(multiple, *each.channels.shape) for each in sublayers
    ]


def at_least(sublayer: Sublayer, step: int, min_heads: int) -> int:
    """How many units of a sublayer stay, whatever their scores: heads, in whole steps."""
    heads = math.ceil(min_heads / step) * step if sublayer.name == "attention" else 0
    return min(heads, len(sublayer.channels))


def planned(
    sublayers: Sequence[Sublayer], steps: Sequence[int], ratio: float, min_heads: int, layers: int
) -> list[Kept]:
    """What the layers keep if the removal is spread as evenly as steps allow, though not all are alike."""
    heads, budget = [0] * layers, (1 - ratio) * sum(sublayer.total for sublayer in sublayers)
    mlps = []
    for sublayer, step in zip(sublayers, steps, strict=True):
        if sublayer.name == "mlp":
            mlps.append((sublayer, step))
            continue
        units = len(sublayer.channels)
        wanted = max(round((1 - ratio) * units / step) * step, at_least(sublayer, step, min_heads))
        heads[sublayer.index] = min(wanted, units)
        budget -= heads[sublayer.index] * sublayer.flops
    neurons = _spread_neurons(mlps, budget, layers)
    return [Kept(*map(torch.arange, counts)) for counts in zip(heads, neurons, strict=True)]


def _spread_neurons(mlps: Sequence[tuple[Sublayer, int]], budget: float, layers: int) -> list[int]:
    """How many neurons every layer keeps if the MLPs, given with their steps, share a budget of FLOPs."""
    share = min(max(budget / max(sum(sublayer.total for sublayer, _ in mlps), 1), 0), 1)
    neurons, owed = [0] * layers, 0.0
    for sublayer, step in mlps:
        units = len(sublayer.channels)
        owed += share * units / step
        neurons[sublayer.index] = units if share == 1 else min(round(owed) * step, units)
        owed -= neurons[sublayer.index] / step
    if 0 < share < 1 and len(set(neurons)) == 1 < layers:
        step = mlps[0][1]
        if step <= neurons[0] <= len(mlps[0][0].channels) - step:
            neurons[0], neurons[-1] = neurons[0] + step, neurons[-1] - step
    return neurons


def affordable(
    scores: Sequence[Tensor], flops: Sequence[int], budget: int, steps: Sequence[int] | None = None
) -> list[Tensor]:
    """Knowledge-preserving mask search: drop the units with the lowest scores until the rest fits the budget.

    Args:
        scores: for every sublayer the scores of its units [units]; infinite ones always stay.
        flops: for every sublayer the FLOPs of one unit.
        budget: FLOPs that all units together may cost.
        steps: for every sublayer how many units, next to each other by their scores, are dropped together, by
            the means of their scores; by default one.

    Returns:
        For every sublayer bool [units], True for units that stay.
    """
    lists = [bundles_of(*each) for each in zip(scores, flops, steps or [1] * len(scores), strict=True)]
    costs, means = (torch.cat([getattr(listed, name) for listed in lists]) for name in ("costs", "scores"))
    order = means.argsort(stable=True)
    left = costs.sum() - torch.cat([costs.new_zeros(1), costs[order].cumsum(0)])
    keep = torch.ones(len(costs), dtype=torch.bool)
    keep[order[: int((left > budget).sum())]] = False
    keep |= means.isinf()
    masks = []
    for each, listed, bundles in zip(
        scores, lists, keep.split([len(listed.sizes) for listed in lists]), strict=True
    ):
        mask = torch.zeros(len(each), dtype=torch.bool)
        mask[listed.order[: int(listed.sizes[bundles].sum())]] = True
        masks.append(mask)
    return masks
