"""The input channels of the output projections of attention and MLP: their statistics and their worth.

A neuron has one channel, a key-value head those of all query heads of its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from compress.anatomy import weight
from compress.calibration.statistics.moments import Moments, Products
from compress.engine.stream import Layer, Observer, Seen, StreamedModel
from compress.pruning.parts.allocation import Scores
from compress.pruning.parts.width import Kept, channels_of_groups

if TYPE_CHECKING:
    from compress.method import StepContext

Metric = Literal["IFV", "WIFV", "WIFN"]

METRICS: dict[str, Callable[[torch.Tensor, Moments], torch.Tensor]] = {
    "IFV": lambda weight, moments: moments.variance,
    "WIFV": lambda weight, moments: moments.variance * weight.square().sum(0),
    "WIFN": lambda weight, moments: weight.abs().mean(0) * moments.squared_norm.sqrt(),
}
"""Of every input channel, from the weight [out, in] and the moments of the inputs."""


def channel_statistics(model: StreamedModel, metric: Metric, context: StepContext) -> dict[str, torch.Tensor]:
    """What the output projections are given by the dense model.

    Returns:
        "{layer}.{path}.metric" and "{layer}.{path}.mean" -> float64 [channels]: the metric of every input
        channel, and its mean over tokens.
    """
    stream = model.stream(context.calibration, context.folder / "statistics")
    journal = context.journal("statistics")
    for layer in model.walk(journal, stream, label="taking statistics"):
        seen = {
            path: Moments(weight(layer.linears[path]).shape[1], model.device)
            for path in (model.anatomy.attention_output, model.anatomy.down)
            if path in layer.linears
        }
        stream.advance(layer, observe={path: watch(moments) for path, moments in seen.items()})
        for path, moments in seen.items():
            values = METRICS[metric](weight(layer.linears[path]).double(), moments)
            journal.state[f"{layer.index}.{path}.metric"] = values.cpu()
            journal.state[f"{layer.index}.{path}.mean"] = moments.mean.cpu()
    return journal.state


def channels_of(
    model: StreamedModel, index: int, statistics: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The metrics of a layer's channels: those of its attention and of its MLP; empty where there is none."""
    none = torch.zeros(0, dtype=torch.float64)
    paths = (model.anatomy.attention_output, model.anatomy.down)
    attention, mlp = (statistics.get(f"{index}.{path}.metric", none) for path in paths)
    return attention, mlp


def unit_scores(model: StreamedModel, index: int, attention: torch.Tensor, mlp: torch.Tensor) -> Scores:
    """Scores of the units of a layer from those of its channels: the mean over the channels of a unit."""
    channels = channels_of_groups(model.anatomy, model.config, index)
    return Scores(attention[channels].mean(1), mlp)


def pruned_inputs(model: StreamedModel, layer: Layer, kept: Kept) -> dict[str, torch.Tensor]:
    """The channels that stay, int64, by the path of every output projection that loses some."""
    anatomy = model.anatomy
    groups = channels_of_groups(anatomy, model.config, layer.index)
    columns = {anatomy.attention_output: groups[kept.groups].flatten(), anatomy.down: kept.neurons}
    return {
        path: stay
        for path, stay in columns.items()
        if path in layer.linears and len(stay) < weight(layer.linears[path]).shape[1]
    }


def watch(statistics: Moments | Products) -> Observer:
    """An observer that takes in a module's inputs, window by window, without padding."""

    def observer(seen: Seen) -> None:
        for window, real in zip(seen.inputs, seen.mask, strict=True):
            statistics.add(window[real])

    return observer
