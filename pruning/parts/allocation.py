"""How wide each layer stays: what methods share that score heads and neurons and prune to a budget.

A unit is a key-value head with the query heads of its group, or an MLP neuron; its cost is the number of
parameters that go with it. ``ratio`` is a share of the parameters of all units. In every layer at least one
key-value head and ``multiple`` neurons stay, and the number of neurons is a multiple of ``multiple`` unless
all stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, NamedTuple

import torch

from compress.anatomy import LayerShape, layer_shapes, projection_rows, weight
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pruning.parts.width import Kept


class Scores(NamedTuple):
    """How much each unit of one layer is worth: float64 [key-value heads] and [neurons]."""

    groups: torch.Tensor
    neurons: torch.Tensor


class Widths(NamedTuple):
    """How many units of one layer stay."""

    groups: int
    neurons: int

    @property
    def kept(self) -> Kept:
        """The first units: for plans, where it does not matter which ones stay."""
        return Kept(torch.arange(self.groups), torch.arange(self.neurons))


@dataclass(frozen=True)
class Units:
    """How many units one layer has, and the parameters, biases included, that go with one of them."""

    groups: int
    neurons: int
    group_cost: float
    neuron_cost: float

    @property
    def cost(self) -> float:
        """Of all units."""
        return self.groups * self.group_cost + self.neurons * self.neuron_cost

    def least_cost(self, multiple: int) -> float:
        """Of the units that must stay."""
        return min(self.groups, 1) * self.group_cost + min(self.neurons, multiple) * self.neuron_cost

    def nearest_width(self, neurons: float, multiple: int) -> int:
        """The allowed number of neurons nearest to ``neurons``."""
        below = int(neurons // multiple) * multiple
        allowed = {min(max(width, multiple), self.neurons) for width in (below, below + multiple)}
        return min(sorted(allowed), key=lambda width: abs(width - neurons))


def units_of(shape: ModelShape) -> list[Units]:
    """The units of every layer; a block that was removed has none, at no cost."""
    layers = shape.skeleton.base_model.get_submodule(shape.anatomy.layers)
    return [
        _units(shape, index, layer, widths)
        for index, (layer, widths) in enumerate(
            zip(layers, layer_shapes(shape.pretrained_config), strict=True)
        )
    ]


def _units(shape: ModelShape, index: int, layer: torch.nn.Module, widths: LayerShape) -> Units:
    anatomy, linears = shape.anatomy, shape.anatomy.linears(layer)
    rows = projection_rows(shape.pretrained_config, index)

    def cost(units: int, output: str, *roles: str) -> float:
        if not units:
            return 0.0
        total = linears[output].weight.numel()
        for role in roles:
            if role in rows:
                linear = linears[getattr(anatomy, role)]
                total += rows[role].numel() * (weight(linear).shape[1] + (linear.bias is not None))
        return total / units

    groups, neurons = widths.num_key_value_heads, widths.intermediate_size
    return Units(
        groups,
        neurons,
        cost(groups, anatomy.attention_output, "query", "key", "value"),
        cost(neurons, anatomy.down, "gate", "up"),
    )


def check_ratio(units: Sequence[Units], ratio: float, multiple: int) -> None:
    """Raises BadInput if this share cannot be removed, or a layer has less than ``multiple`` neurons."""
    for index, layer in enumerate(units):
        if 0 < layer.neurons < multiple:
            raise BadInput(
                f"Layer {index} has {layer.neurons} neurons, fewer than the width_multiple {multiple}."
            )
    total = sum(layer.cost for layer in units)
    most = 1 - sum(layer.least_cost(multiple) for layer in units) / total
    if ratio > most:
        few = "one neuron" if multiple == 1 else f"{multiple} neurons"
        raise BadInput(
            f"A ratio of {ratio:g} leaves too little: one key-value head and {few} stay in every layer, so "
            f"at most {math.floor(1000 * most) / 1000:g} of this model can be removed."
        )


def rank(scores: Sequence[Scores], units: Sequence[Units], ratio: float, multiple: int = 1) -> list[Kept]:
    """One ranking of the units of all layers, cut where what stays is nearest to the budget."""
    budget = (1 - ratio) * sum(layer.cost for layer in units)
    groups, neurons = _lists(scores, units, multiple)
    kept = _best(groups + neurons, budget)
    return list(starmap(Kept, zip(kept[: len(groups)], kept[len(groups) :], strict=True)))


def rank_apart(
    scores: Sequence[Scores], units: Sequence[Units], ratio: float, removed_groups: int, multiple: int = 1
) -> list[Kept]:
    """A ranking of the heads of all layers, of which ``removed_groups`` go, and one of the neurons, which
    make up the rest of the budget.

    Raises:
        BadInput: as `spread_widths`.
    """
    groups, neurons = _lists(scores, units, multiple)
    alike = [listed._replace(costs=torch.ones_like(listed.costs)) for listed in groups]
    kept_groups = _best(alike, sum(layer.groups for layer in units) - removed_groups)
    spent = sum(len(kept) * layer.group_cost for kept, layer in zip(kept_groups, units, strict=True))
    budget = _for_neurons(units, ratio, removed_groups, spent, multiple)
    return list(starmap(Kept, zip(kept_groups, _best(neurons, budget), strict=True)))


def best(scores: Sequence[Scores], widths: Sequence[Widths]) -> list[Kept]:
    """The best units of each layer, as many as ``widths`` says."""
    return [
        Kept(_top(of.groups, width.groups), _top(of.neurons, width.neurons))
        for of, width in zip(scores, widths, strict=True)
    ]


def floor_widths(units: Sequence[Units], ratio: float, multiple: int = 1) -> list[Widths]:
    """Every layer loses floor(ratio * units) of its heads and of its neurons, so less than ``ratio``."""
    return [
        Widths(
            layer.groups - math.floor(ratio * layer.groups),
            layer.nearest_width(layer.neurons - math.floor(ratio * layer.neurons), multiple),
        )
        for layer in units
    ]


def even_widths(
    units: Sequence[Units], ratio: float, multiple: int = 1, removed_groups: int | None = None
) -> list[Widths]:
    """Every layer loses the same share of its parameters.

    Args:
        units: of every layer.
        ratio: share to remove.
        multiple: of neurons.
        removed_groups: key-value heads that each layer loses; neurons make up the rest of its budget. If not
            given, as near to ``ratio`` of them as that allows.

    Raises:
        BadInput: neurons cannot make up for so many heads.
    """
    widths = []
    for index, layer in enumerate(units):
        budget = (1 - ratio) * layer.cost
        counts = range(layer.groups) if layer.groups else range(1)
        if removed_groups is not None:
            counts = [removed_groups] if removed_groups in counts else []
        found = [_filled(layer, layer.groups - count, budget, multiple) for count in counts]
        found = [width for width in found if width is not None]
        if not found:
            which = "one more head" if removed_groups is None else f"{removed_groups} heads"
            raise BadInput(
                f"Layer {index} has {layer.groups} key-value heads and {layer.neurons} neurons: neurons "
                f"cannot fill up to a share of {ratio:g} when {which} go; change ratio or width_multiple."
            )
        wanted = (1 - ratio) * layer.groups
        widths.append(min(found, key=lambda width: (abs(width.groups - wanted), -width.groups)))
    return widths


def _filled(layer: Units, groups: int, budget: float, multiple: int) -> Widths | None:
    """So many heads and the neurons that fill the budget, if there is such a number of neurons."""
    if not layer.neurons:
        off = abs(groups * layer.group_cost - budget)
        return Widths(groups, 0) if off <= layer.group_cost / 2 else None
    neurons = layer.nearest_width((budget - groups * layer.group_cost) / layer.neuron_cost, multiple)
    off = abs(groups * layer.group_cost + neurons * layer.neuron_cost - budget)
    return Widths(groups, neurons) if off <= multiple * layer.neuron_cost / 2 else None


def spread_widths(
    units: Sequence[Units], ratio: float, multiple: int = 1, removed_groups: int | None = None
) -> list[Widths]:
    """A prediction for rankings over layers: widths of the right sum, which differ as they will.

    Raises:
        BadInput: neurons cannot make up for so many heads, or a layer would be left without any.
    """
    if removed_groups is None:
        removed_groups = default_removed_groups(units, ratio)
    groups = [layer.groups for layer in units]
    for _ in range(removed_groups):
        groups[max(range(len(groups)), key=lambda index: (groups[index], index))] -= 1
    spent = sum(count * layer.group_cost for count, layer in zip(groups, units, strict=True))
    budget = _for_neurons(units, ratio, removed_groups, spent, multiple)
    share = budget / max(sum(layer.neurons * layer.neuron_cost for layer in units), 1)
    neurons = [layer.nearest_width(share * layer.neurons, multiple) for layer in units]
    if 0 < share < 1:
        first, last = neurons[0] + multiple, neurons[-1] - multiple
        if first <= units[0].neurons and last >= multiple:
            neurons[0], neurons[-1] = first, last
    return list(starmap(Widths, zip(groups, neurons, strict=True)))


def default_removed_groups(units: Sequence[Units], ratio: float) -> int:
    """The share ``ratio`` of all key-value heads, as far as one can stay in every layer."""
    total, layers = sum(layer.groups for layer in units), sum(layer.groups > 0 for layer in units)
    return min(round(ratio * total), total - layers)


def _for_neurons(
    units: Sequence[Units], ratio: float, removed_groups: int, spent: float, multiple: int
) -> float:
    """What is left for neurons of the budget, of which heads take ``spent``."""
    total, layers = sum(layer.groups for layer in units), sum(layer.groups > 0 for layer in units)
    if removed_groups > total - layers:
        raise BadInput(
            f"At most {total - layers} of the {total} key-value heads can go: one of each layer stays."
        )
    budget = (1 - ratio) * sum(layer.cost for layer in units) - spent
    most = sum(layer.neurons * layer.neuron_cost for layer in units)
    least = sum(min(layer.neurons, multiple) * layer.neuron_cost for layer in units)
    slack = max(multiple * layer.neuron_cost for layer in units)
    if not least - slack <= budget <= most + slack:
        raise BadInput(
            f"When {removed_groups} key-value heads go, neurons cannot make that a share of {ratio:g} of the "
            "parameters; change remove_heads or ratio."
        )
    return budget


class _List(NamedTuple):
    """Units of one kind in one layer, best first, cut into blocks that stay or go together."""

    order: torch.Tensor
    sizes: torch.Tensor
    scores: torch.Tensor
    costs: torch.Tensor


def _lists(
    scores: Sequence[Scores], units: Sequence[Units], multiple: int
) -> tuple[list[_List], list[_List]]:
    pairs = list(zip(scores, units, strict=True))
    groups = [_list(of.groups, layer.group_cost, 1) for of, layer in pairs]
    return groups, [_list(of.neurons, layer.neuron_cost, multiple) for of, layer in pairs]


def _list(scores: torch.Tensor, cost: float, size: int) -> _List:
    order = scores.argsort(descending=True, stable=True)
    starts = torch.arange(0, len(scores), size)
    sizes = torch.full_like(starts, size)
    if len(scores) % size:
        sizes[-1] = len(scores) % size
    sums = torch.zeros(len(starts), dtype=torch.float64)
    sums.index_add_(0, torch.arange(len(scores)) // size, scores[order].double())
    means = sums / sizes
    means[:1] = torch.inf  # the best block stays in any case
    return _List(order, sizes, means, sizes * float(cost))


def _best(lists: Sequence[_List], budget: float) -> list[torch.Tensor]:
    """The best blocks of all lists, as many as come nearest to the budget: sorted indices for each list."""
    scores = torch.cat([listed.scores for listed in lists])
    costs = torch.cat([listed.costs for listed in lists])
    if not len(scores):
        return [listed.order for listed in lists]
    order = scores.argsort(descending=True, stable=True)
    count = int((costs[order].cumsum(0) - budget).abs().argmin()) + 1
    count = max(count, int(scores.isinf().sum()))
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[order[:count]] = True
    kept = []
    for listed, blocks in zip(lists, stays.split([len(listed.sizes) for listed in lists]), strict=True):
        kept.append(listed.order[: int(listed.sizes[blocks].sum())].sort().values)
    return kept


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def standardised(values: torch.Tensor) -> torch.Tensor:
    """(x - mean) / standard deviation (unbiased); zeros where all are equal."""
    if len(values) < 2 or not (deviation := values.std()) > 0:
        return torch.zeros_like(values)
    return (values - values.mean()) / deviation


def removal(kept: Sequence[Kept], units: Sequence[Units]) -> tuple[str, dict[str, Any]]:
    """What went, as the beginning of a sentence and as details for a report."""
    left = sum(
        len(stay.groups) * layer.group_cost + len(stay.neurons) * layer.neuron_cost
        for stay, layer in zip(kept, units, strict=True)
    )
    details = {
        "ratio_removed": 1 - left / sum(layer.cost for layer in units),
        "key_value_heads": [len(stay.groups) for stay in kept],
        "neurons": [len(stay.neurons) for stay in kept],
    }
    groups, neurons = sum(layer.groups for layer in units), sum(layer.neurons for layer in units)
    text = (
        f"removed {details['ratio_removed']:.1%} of the layers' projections: "
        f"{groups - sum(details['key_value_heads'])} of {groups} key-value heads with their query heads, "
        f"{neurons - sum(details['neurons']):,} of {neurons:,} neurons"
    )
    return text, details
