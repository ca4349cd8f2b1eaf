"""FLAP against a slow float64 restatement on plain transformers models with hooks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.calibration.statistics.moments import Products
from compress.engine.logits import streamed_logits
from compress.engine.windows import Windows
from compress.pruning.flap import refit

from .common import FAMILIES, LAYERS, WINDOWS, Applied, applied

# The restatement.


class Restated:
    """The dense model in float64; pruning sets columns of its output projections to zero."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = FAMILIES[family]
        self.model = self.family.cls.from_pretrained(folder, dtype=torch.float64).eval()
        self.dense = [{path: self.inputs(index, path) for path in self.paths} for index in range(LAYERS)]
        self.weights = [
            {path: self.matrix(index, path).clone() for path in self.paths} for index in range(LAYERS)
        ]

    @property
    def paths(self) -> tuple[str, str]:
        return self.family.output, self.family.down

    def linear(self, index: int, path: str) -> torch.nn.Module:
        return self.model.get_submodule(f"{self.family.layers}.{index}.{path}")

    def matrix(self, index: int, path: str) -> torch.Tensor:
        linear = self.linear(index, path)
        return linear.weight.data.T if type(linear).__name__ == "Conv1D" else linear.weight.data

    @torch.no_grad()
    def logits(self, windows: Windows = WINDOWS) -> torch.Tensor:
        return self.model(windows.tokens, attention_mask=windows.mask.long()).logits

    def inputs(self, index: int, path: str) -> torch.Tensor:
        """What the projection is given for every real token: [tokens, channels]."""
        seen = []
        handle = self.linear(index, path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        self.logits()
        handle.remove()
        return seen[0].view(*WINDOWS.mask.shape, -1)[WINDOWS.mask]

    def metric(self, index: int, path: str, metric: str) -> torch.Tensor:
        x, w = self.dense[index][path], self.weights[index][path]
        values = []
        for j in range(x.shape[1]):
            variance = ((x[:, j] - x[:, j].mean()) ** 2).mean()
            values.append(
                {
                    "IFV": variance,
                    "WIFV": variance * sum(v**2 for v in w[:, j]),
                    "WIFN": w[:, j].abs().mean() * x[:, j].norm(),
                }[metric]
            )
        values = torch.stack(values)
        return values**2 if path == self.family.output else values

    def unit_scores(self, index: int, metric: str) -> list[tuple[float, str, int]]:
        """(standardised score, kind, number) of every unit of a layer."""
        found = []
        for kind, path in zip(("group", "neuron"), self.paths, strict=True):
            values = self.metric(index, path, metric)
            z = (values - values.mean()) / torch.std(values, unbiased=True)
            per_unit = len(z) // self.family.groups if kind == "group" else 1
            for unit in range(len(z) // per_unit):
                found.append((float(z[unit * per_unit : (unit + 1) * per_unit].mean()), kind, unit))
        return found

    def prune(self, index: int, path: str, gone: list[int], compensate: str, x: torch.Tensor, ridge: float):
        """Set the pruned columns to zero and make up for them by what the projection is given, x."""
        if not gone:
            return
        old, matrix, linear = self.weights[index][path], self.matrix(index, path), self.linear(index, path)
        left = [j for j in range(old.shape[1]) if j not in gone]
        matrix[:, gone] = 0
        if compensate == "bias":
            extra = sum(x[:, j].mean() * old[:, j] for j in gone)
            had = linear.bias.data if linear.bias is not None else 0
            linear.bias = torch.nn.Parameter(had + extra)
        elif compensate == "least-squares":
            # Stacked rows: the projection's own output, and the old weights as often as the ridge says.
            biased = linear.bias is not None
            centred = x - x.mean(0) if biased else x
            strength = math.sqrt(ridge * float(centred[:, left].square().sum(0).mean()))
            rows = torch.cat((centred[:, left], strength * torch.eye(len(left), dtype=torch.float64)))
            wanted = torch.cat((centred @ old.T, strength * old[:, left].T))
            matrix[:, left] = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
            if biased:
                linear.bias.data += x.mean(0) @ (old - matrix).T


def chosen(model: Restated, structure: str, metric: str, ratio: float) -> list[set[tuple[str, int]]]:
    """The units of every layer that stay."""
    family = model.family
    cost = {"group": family.group_cost, "neuron": family.neuron_cost}
    scores = [model.unit_scores(index, metric) for index in range(LAYERS)]
    counts = {kind: sum(unit[1] == kind for unit in scores[0]) for kind in cost}
    layer_cost = sum(counts[kind] * cost[kind] for kind in cost)

    def by_layer(units: list[tuple[float, str, int, int]]) -> list[set[tuple[str, int]]]:
        return [{unit[1:3] for unit in units if unit[3] == index} for index in range(LAYERS)]

    def cut(kinds: set[str], budget: float, price: dict[str, int]) -> list[tuple[float, str, int, int]]:
        units = [(*unit, index) for index, layer in enumerate(scores) for unit in layer if unit[1] in kinds]
        must = [max(u for u in units if u[1] == kind and u[3] == i) for kind in kinds for i in range(LAYERS)]
        units = must + sorted((u for u in units if u not in must), reverse=True)
        spent = [sum(price[u[1]] for u in units[: n + 1]) for n in range(len(units))]
        return units[: 1 + min(range(len(units)), key=lambda n: abs(spent[n] - budget))]

    def top(layer: list, kind: str, count: int) -> list:
        return sorted((unit for unit in layer if unit[1] == kind), reverse=True)[:count]

    if structure == "AL-AM":
        return by_layer(cut(set(cost), (1 - ratio) * LAYERS * layer_cost, cost))
    if structure == "AL-MM":
        left = LAYERS * counts["group"] - round(ratio * LAYERS * counts["group"])
        groups = cut({"group"}, left, {"group": 1})
        budget = (1 - ratio) * LAYERS * layer_cost - left * cost["group"]
        return by_layer(groups + cut({"neuron"}, budget, cost))
    if structure == "UL-UM":
        left = {kind: counts[kind] - int(ratio * counts[kind]) for kind in cost}
    else:
        possible = {}
        for groups in range(1, counts["group"] + 1):
            neurons = round(((1 - ratio) * layer_cost - groups * cost["group"]) / cost["neuron"])
            if 1 <= neurons <= counts["neuron"]:
                possible[groups] = neurons
        groups = min(possible, key=lambda n: (abs(n - (1 - ratio) * counts["group"]), -n))
        left = {"group": groups, "neuron": possible[groups]}
    return [{unit[1:3] for kind in cost for unit in top(layer, kind, left[kind])} for layer in scores]


def restated(
    folder: Path,
    family: str,
    *,
    ratio: float = 0.3,
    structure: str = "AL-AM",
    metric: str = "WIFV",
    compensate: str = "none",
    propagate: str = "dense",
    ridge: float = 1.0,
) -> tuple[Restated, list[set[tuple[str, int]]]]:
    model = Restated(folder, family)
    kept = chosen(model, structure, metric, ratio)
    for index in range(LAYERS):
        for kind, path in zip(("group", "neuron"), model.paths, strict=True):
            channels = model.weights[index][path].shape[1]
            per_unit = channels // model.family.groups if kind == "group" else 1
            gone = [j for j in range(channels) if (kind, j // per_unit) not in kept[index]]
            x = model.dense[index][path] if propagate == "dense" else model.inputs(index, path)
            model.prune(index, path, gone, compensate, x, ridge)
    return model, kept


def check(folder: Path, family: str, work: Path, **options: Any) -> Applied:
    options = {"ratio": 0.3, **options}
    model, kept = restated(folder, family, **options)
    done = applied(folder, work, **options)
    assert done.kept == [
        tuple(sum(unit[0] == kind for unit in layer) for kind in ("group", "neuron")) for layer in kept
    ]
    expected, found = model.logits(), streamed_logits(done.run.draft, WINDOWS)
    real = WINDOWS.mask if expected.shape[:2] == WINDOWS.mask.shape else ...
    torch.testing.assert_close(found[real].double(), expected[real], atol=2e-4, rtol=2e-4)
    return done


STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
METRICS = ("IFV", "WIFV", "WIFN")


# Every metric with every structure once, and each family with some of them.
@pytest.mark.parametrize(
    ("family", "structure", "metric"),
    [
        (list(FAMILIES)[(row + column) % len(FAMILIES)], structure, metric)
        for row, structure in enumerate(STRUCTURES)
        for column, metric in enumerate(METRICS)
    ],
)
def test_the_units_that_stay_are_those_of_the_equations(
    family: str, metric: str, structure: str, folders: dict[str, Path], tmp_path: Path
):
    check(folders[family], family, tmp_path, metric=metric, structure=structure, compensate="none")


# Every family with both, and both of them with either stream in families with biases and without.
@pytest.mark.parametrize(
    ("family", "compensate", "propagate"),
    [
        (family, compensate, ("dense", "pruned")[(row + column) % 2])
        for row, family in enumerate(FAMILIES)
        for column, compensate in enumerate(("bias", "least-squares"))
    ],
)
def test_the_compensation_is_that_of_the_equations(
    family: str, compensate: str, propagate: str, folders: dict[str, Path], tmp_path: Path
):
    check(folders[family], family, tmp_path, compensate=compensate, propagate=propagate)


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_are_always_the_same_can_be_pruned(bias: bool):
    """As in a block that is all zeros, of a model that was pruned without changing its shape."""
    linear, inputs = torch.nn.Linear(6, 4, bias=bias), torch.zeros(9, 6)
    if bias:
        inputs += torch.arange(6)
    before, weight = linear(inputs), linear.weight.clone()
    seen = Products(6, torch.tensor([0, 2, 3]), centred=bias)
    seen.add(inputs)
    refit(linear, seen, damping=1.0)
    assert torch.equal(linear.weight[:, [0, 2, 3]], weight[:, [0, 2, 3]])
    assert not linear.weight[:, [1, 4, 5]].any()
    torch.testing.assert_close(linear(inputs), before)
