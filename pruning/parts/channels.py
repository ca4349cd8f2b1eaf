"""Score the input channels of output projections (of attention and MLP) by statistics of their inputs.

A neuron has one channel. A key-value head has the channels of all query heads of its group.
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
    "IFV": lambda matrix, moments: moments.variance,
    "WIFV": lambda matrix, moments: moments.variance * matrix.square().sum(0),
    "WIFN": lambda matrix, moments: matrix.abs().mean(0) * moments.squared_norm.sqrt(),
}
"""Metric of every input channel [in], computed from the weight [out, in] and the moments of the inputs."""


def channel_statistics(model: StreamedModel, metric: Metric, context: StepContext) -> dict[str, torch.Tensor]:
    """The statistics of the inputs that the output projections get in the dense model.

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
    """The metrics of the channels of a layer's attention and of its MLP; empty for a block that is gone."""
    none = torch.zeros(0, dtype=torch.float64)
    paths = (model.anatomy.attention_output, model.anatomy.down)
    attention, mlp = (statistics.get(f"{index}.{path}.metric", none) for path in paths)
    return attention, mlp


def unit_scores(model: StreamedModel, index: int, attention: torch.Tensor, mlp: torch.Tensor) -> Scores:
    """The scores of a layer's units: the mean of the scores of each unit's channels."""
    channels = channels_of_groups(model.config, index)
    return Scores(attention[channels].mean(1), mlp)


def pruned_inputs(model: StreamedModel, layer: Layer, kept: Kept) -> dict[str, torch.Tensor]:
    """Path of every output projection that loses channels -> the channels that it keeps, int64."""
    anatomy = model.anatomy
    groups = channels_of_groups(model.config, layer.index)
    columns = {anatomy.attention_output: groups[kept.groups].flatten(), anatomy.down: kept.neurons}
    return {
        path: stay
        for path, stay in columns.items()
        if path in layer.linears and len(stay) < weight(layer.linears[path]).shape[1]
    }


def watch(statistics: Moments | Products) -> Observer:
    """An observer that adds the inputs of a module, without padding, to statistics."""

    def observer(seen: Seen) -> None:
        for window in seen.windows(seen.inputs):
            statistics.add(window)

    return observer
