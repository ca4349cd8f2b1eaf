"""Decide how many heads and neurons each layer keeps, and which ones, for a budget of parameters.

A unit is a key-value head with the query heads of its group, or an MLP neuron. Its cost is the number of
parameters that are removed with it. ``ratio`` is the share of the parameters of all units to remove. Every
layer keeps at least one key-value head and ``multiple`` neurons, and the number of neurons is a multiple of
``multiple`` unless all of them stay. Heads go in steps (see `head_step`), unless their number is given.
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
    """The scores of the units of one layer, larger ones stay: float64 [key-value heads] and [neurons]."""

    groups: torch.Tensor
    neurons: torch.Tensor


class Widths(NamedTuple):
    """How many units of one layer stay."""

    groups: int
    neurons: int

    @property
    def kept(self) -> Kept:
        """The first units, for plans, which depend only on how many stay."""
        return Kept(torch.arange(self.groups), torch.arange(self.neurons))


@dataclass(frozen=True)
class Units:
    """How many units one layer has, and the parameters (with biases) that are removed with one of them."""

    groups: int
    neurons: int
    group_cost: float
    neuron_cost: float
    group_channels: int = 0  # inputs of the attention's output projection that belong to a key-value head

    def group_step(self, multiple: int) -> int:
        """How many key-value heads stay or go together (see `head_step`)."""
        return head_step(multiple, self.groups, self.group_channels)

    @property
    def cost(self) -> float:
        """The parameters of all units."""
        return self.groups * self.group_cost + self.neurons * self.neuron_cost

    def least_cost(self, multiple: int) -> float:
        """The parameters of the units that must stay."""
        groups = min(self.groups, self.group_step(multiple))
        return groups * self.group_cost + min(self.neurons, multiple) * self.neuron_cost

    def nearest_width(self, neurons: float, multiple: int) -> int:
        """The allowed number of neurons nearest to ``neurons``."""
        below = int(neurons // multiple) * multiple
        allowed = {min(max(width, multiple), self.neurons) for width in (below, below + multiple)}
        return min(sorted(allowed), key=lambda width: abs(width - neurons))


def head_step(multiple: int, heads: int, channels: int) -> int:
    """How many of a layer's ``heads``, each ``channels`` wide, have to stay or go together.

    With such steps the width of the heads that stay is a multiple of ``multiple``, if that of all heads is.
    """
    common = math.gcd(multiple, heads * channels)
    return common // math.gcd(common, channels)


def units_of(shape: ModelShape) -> list[Units]:
    """The units of every layer; a block that was removed has none."""
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
        total = weight(linears[output]).numel()
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
        shape.sizes.head_dim * widths.num_attention_heads // max(groups, 1),
    )


def check_ratio(units: Sequence[Units], ratio: float, multiple: int) -> None:
    """Check that a share can be removed.

    Raises:
        BadInput: too little would be left, or all layers have less than ``multiple`` neurons.
    """
    if 0 < (widest := max(layer.neurons for layer in units)) < multiple:
        raise BadInput(f"The layers have {widest} neurons, fewer than the width_multiple {multiple}.")
    total = sum(layer.cost for layer in units)
    most = 1 - sum(layer.least_cost(multiple) for layer in units) / total
    if ratio > most:
        few = "one neuron" if multiple == 1 else f"{multiple} neurons"
        step = max(layer.group_step(multiple) for layer in units)
        heads = "one key-value head" if step == 1 else f"{step} key-value heads"
        raise BadInput(
            f"A ratio of {ratio:g} leaves too little: every layer keeps {heads} and {few}, so at most "
            f"{math.floor(1000 * most) / 1000:g} of this model can be removed; with a smaller width_multiple "
            "it is more."
        )


def rank(scores: Sequence[Scores], units: Sequence[Units], ratio: float, multiple: int = 1) -> list[Kept]:
    """Rank the units of all layers together, and keep the best ones, as near to the budget as possible."""
    budget = (1 - ratio) * sum(layer.cost for layer in units)
    groups, neurons = _lists(scores, units, multiple)
    kept = _best(groups + neurons, budget)
    return list(starmap(Kept, zip(kept[: len(groups)], kept[len(groups) :], strict=True)))


def rank_apart(
    scores: Sequence[Scores],
    units: Sequence[Units],
    ratio: float,
    removed_groups: int | None = None,
    multiple: int = 1,
) -> list[Kept]:
    """Rank the heads of all layers, of which ``removed_groups`` are removed (by default the share ``ratio``),
    and apart from them the neurons, which fill the rest of the budget.

    Raises:
        BadInput: as `spread_widths`.
    """
    groups, neurons = _lists(scores, units, multiple)
    if removed_groups is not None:
        groups, _ = _lists(scores, units, 1)
    else:
        removed_groups = default_removed_groups(units, ratio, multiple)
    alike = [listed._replace(costs=listed.sizes.double()) for listed in groups]
    kept_groups = _best(alike, sum(layer.groups for layer in units) - removed_groups)
    spent = sum(len(kept) * layer.group_cost for kept, layer in zip(kept_groups, units, strict=True))
    budget = _for_neurons(units, ratio, removed_groups, spent, multiple)
    return list(starmap(Kept, zip(kept_groups, _best(neurons, budget), strict=True)))


def best(scores: Sequence[Scores], widths: Sequence[Widths]) -> list[Kept]:
    """Keep the best units of each layer, as many as ``widths`` says."""
    return [
        Kept(_top(of.groups, width.groups), _top(of.neurons, width.neurons))
        for of, width in zip(scores, widths, strict=True)
    ]


def floor_of(number: float) -> int:
    """The floor of a share of a whole number, such as 0.58 * 50, which rounding errors make 28.999999."""
    return math.floor(round(number, 6))


def floor_widths(units: Sequence[Units], ratio: float, multiple: int = 1) -> list[Widths]:
    """Remove floor(ratio * units) of the heads and of the neurons of every layer: at most ``ratio``."""
    steps = [layer.group_step(multiple) for layer in units]
    return [
        Widths(
            layer.groups - floor_of(ratio * layer.groups / step) * step,
            layer.nearest_width(layer.neurons - floor_of(ratio * layer.neurons), multiple),
        )
        for layer, step in zip(units, steps, strict=True)
    ]


def even_widths(
    units: Sequence[Units], ratio: float, multiple: int = 1, removed_groups: int | None = None
) -> list[Widths]:
    """Remove the same share of the parameters of every layer.

    Args:
        units: the units of every layer.
        ratio: share to remove.
        multiple: keep a multiple of this many neurons.
        removed_groups: key-value heads that each layer loses; neurons fill the rest of its budget. By default
            it is as near to the share ``ratio`` of them as the budget allows.

    Raises:
        BadInput: no number of neurons fills the budget.
    """
    widths = []
    for index, layer in enumerate(units):
        budget = (1 - ratio) * layer.cost
        counts: Sequence[int] = range(0, max(layer.groups, 1), layer.group_step(multiple))
        if removed_groups is not None:
            counts = [removed_groups] if removed_groups < max(layer.groups, 1) else []
        filled = (_filled(layer, layer.groups - count, budget, multiple) for count in counts)
        found = [width for width in filled if width is not None]
        if not found:
            heads = "" if removed_groups is None else f" when it loses {removed_groups} of its heads"
            raise BadInput(
                f"Layer {index} has {layer.groups} key-value heads and {layer.neurons} neurons, and no "
                f"number of neurons makes it lose a share of {ratio:g}{heads}; change ratio or "
                "width_multiple."
            )
        wanted = (1 - ratio) * layer.groups
        widths.append(min(found, key=lambda width: (abs(width.groups - wanted), -width.groups)))
    return widths


def _filled(layer: Units, groups: int, budget: float, multiple: int) -> Widths | None:
    """The widths with ``groups`` heads and the neurons that fill the budget; None if no number does."""
    if not layer.neurons:
        off = abs(groups * layer.group_cost - budget)
        return Widths(groups, 0) if off <= layer.group_cost / 2 else None
    neurons = layer.nearest_width((budget - groups * layer.group_cost) / layer.neuron_cost, multiple)
    off = abs(groups * layer.group_cost + neurons * layer.neuron_cost - budget)
    return Widths(groups, neurons) if off <= multiple * layer.neuron_cost / 2 else None


def spread_widths(
    units: Sequence[Units], ratio: float, multiple: int = 1, removed_groups: int | None = None
) -> list[Widths]:
    """Predict the widths that a ranking over all layers gives: their sum is right, and they differ.

    Raises:
        BadInput: no number of neurons fills the budget, or a layer would be left without heads.
    """
    groups = _spread_groups(units, ratio, multiple, removed_groups)
    if removed_groups is None:
        removed_groups = default_removed_groups(units, ratio, multiple)
    spent = sum(count * layer.group_cost for count, layer in zip(groups, units, strict=True))
    budget = _for_neurons(units, ratio, removed_groups, spent, multiple)
    share = budget / max(sum(layer.neurons * layer.neuron_cost for layer in units), 1)
    neurons, owed = [], 0.0  # what rounding has left over goes to the next layer
    for layer in units:
        owed += share * layer.neurons
        neurons.append(layer.nearest_width(owed, multiple))
        owed -= neurons[-1]
    if 0 < share < 1 and len(set(neurons)) == 1:
        first, last = neurons[0] + multiple, neurons[-1] - multiple
        if first <= units[0].neurons and last >= multiple:
            neurons[0], neurons[-1] = first, last
    return list(starmap(Widths, zip(groups, neurons, strict=True)))


def default_removed_groups(units: Sequence[Units], ratio: float, multiple: int = 1) -> int:
    """The share ``ratio`` of all key-value heads in whole steps, of which every layer keeps at least one."""
    return sum(layer.groups for layer in units) - sum(_spread_groups(units, ratio, multiple, None))


def _spread_groups(
    units: Sequence[Units], ratio: float, multiple: int, removed_groups: int | None
) -> list[int]:
    """How many key-value heads every layer keeps, if they are taken from where most are left.

    Args:
        units: the units of every layer.
        ratio: share of the heads to remove, as near as steps allow, if there is no ``removed_groups``.
        multiple: makes the steps.
        removed_groups: how many heads to remove, one by one.
    """
    groups = [layer.groups for layer in units]
    steps = [1 if removed_groups is not None else layer.group_step(multiple) for layer in units]
    left = ratio * sum(groups) if removed_groups is None else removed_groups
    while able := [index for index, step in enumerate(steps) if groups[index] > step]:
        index = max(able, key=lambda index: (groups[index], index))
        if 2 * left < steps[index]:
            break
        groups[index] -= steps[index]
        left -= steps[index]
    return groups


def _for_neurons(
    units: Sequence[Units], ratio: float, removed_groups: int, spent: float, multiple: int
) -> float:
    """The parameters that neurons may have, when heads take ``spent`` of the budget."""
    total, layers = sum(layer.groups for layer in units), sum(layer.groups > 0 for layer in units)
    if removed_groups > total - layers:
        raise BadInput(
            f"At most {total - layers} of the {total} key-value heads can be removed, because every layer "
            "keeps one; change remove_heads."
        )
    budget = (1 - ratio) * sum(layer.cost for layer in units) - spent
    most = sum(layer.neurons * layer.neuron_cost for layer in units)
    least = sum(min(layer.neurons, multiple) * layer.neuron_cost for layer in units)
    slack = max(multiple * layer.neuron_cost for layer in units)
    if not least - slack <= budget <= most + slack:
        raise BadInput(
            f"When {removed_groups} key-value heads are removed, no number of neurons makes that a share of "
            f"{ratio:g} of the parameters; change remove_heads or ratio."
        )
    return budget


class Bundles(NamedTuple):
    """Units of one kind in one layer, best first, in bundles that stay or go together.

    Attributes:
        order: int64 [units], their indices, best first.
        sizes: int64 [bundles], units in each; only the last bundle may be smaller than the others.
        scores: float64 [bundles], means of the scores of their units.
        costs: float64 [bundles].
    """

    order: torch.Tensor
    sizes: torch.Tensor
    scores: torch.Tensor
    costs: torch.Tensor


def _lists(
    scores: Sequence[Scores], units: Sequence[Units], multiple: int
) -> tuple[list[Bundles], list[Bundles]]:
    pairs = list(zip(scores, units, strict=True))
    groups = [bundles_of(of.groups, layer.group_cost, layer.group_step(multiple)) for of, layer in pairs]
    neurons = [bundles_of(of.neurons, layer.neuron_cost, multiple) for of, layer in pairs]
    for listed in [*groups, *neurons]:
        listed.scores[:1] = torch.inf  # the best bundle always stays
    return groups, neurons


def bundles_of(scores: torch.Tensor, cost: float, size: int) -> Bundles:
    """Bundle the units of one kind in one layer.

    Args:
        scores: of the units [units].
        cost: of one unit.
        size: units in a bundle.
    """
    order = scores.argsort(descending=True, stable=True)
    starts = torch.arange(0, len(scores), size)
    sizes = torch.full_like(starts, size)
    if len(scores) % size:
        sizes[-1] = len(scores) % size
    sums = torch.zeros(len(starts), dtype=torch.float64)
    sums.index_add_(0, torch.arange(len(scores)) // size, scores[order].double())
    return Bundles(order, sizes, sums / sizes, sizes * float(cost))


def _best(lists: Sequence[Bundles], budget: float) -> list[torch.Tensor]:
    """Keep the best bundles of all lists, as near to the budget as possible: sorted indices for each list."""
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
    for listed, bundles in zip(lists, stays.split([len(listed.sizes) for listed in lists]), strict=True):
        kept.append(listed.order[: int(listed.sizes[bundles].sum())].sort().values)
    return kept


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def standardised(values: torch.Tensor) -> torch.Tensor:
    """(x - mean) / standard deviation (unbiased), or zeros if all values are equal."""
    if len(values) < 2 or not (deviation := values.std()) > 0:
        return torch.zeros_like(values)
    return (values - values.mean()) / deviation


def removal(kept: Sequence[Kept], units: Sequence[Units]) -> tuple[str, dict[str, Any]]:
    """What was removed, as the beginning of a sentence and as details for a report."""
    left = sum(
        len(stay.groups) * layer.group_cost + len(stay.neurons) * layer.neuron_cost
        for stay, layer in zip(kept, units, strict=True)
    )
    ratio = 1 - left / sum(layer.cost for layer in units)
    kept_groups, kept_neurons = [len(stay.groups) for stay in kept], [len(stay.neurons) for stay in kept]
    groups, neurons = sum(layer.groups for layer in units), sum(layer.neurons for layer in units)
    text = (
        f"removed {ratio:.1%} of the layers' projections: "
        f"{groups - sum(kept_groups)} of {groups} key-value heads with their query heads, "
        f"{neurons - sum(kept_neurons):,} of {neurons:,} neurons"
    )
    return text, {"ratio_removed": ratio, "key_value_heads": kept_groups, "neurons": kept_neurons}
