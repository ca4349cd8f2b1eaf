"""Structured magnitude pruning: the baseline that needs no data, with which other methods are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from compress.anatomy import projection_rows, weight
from compress.engine.shape import ModelShape
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.allocation import (
    Scores,
    best,
    check_ratio,
    even_widths,
    rank,
    removal,
    spread_widths,
    standardised,
    units_of,
)
from compress.pruning.parts.options import ParameterRatio, WidthMultiple
from compress.pruning.parts.width import channels_of_groups, plan_widths, prune

if TYPE_CHECKING:
    from compress.engine.stream import Layer, StreamedModel
    from compress.method import StepContext


class Magnitude(Method["Magnitude.Options"]):
    """Prune the heads and MLP neurons with the smallest weights, without calibration.

    The score of a unit (a key-value head with the query heads of its group, or a neuron) is the mean of w^2
    over all its weights. Those of a head are its rows of the query, key and value projections and its columns
    of the output projection; those of a neuron are its rows of gate and up and its column of down. Because
    the score is a mean, units of different sizes are ranked by what is lost per parameter removed.
    """

    name = "magnitude"
    family = "pruning"
    paper = Paper("Pruning Filters for Efficient ConvNets", "1608.08710")
    needs_calibration = False

    class Options(WidthMultiple, ParameterRatio):
        allocation: Literal["per-layer", "global", "standardised"] = Field(
            "per-layer",
            description="how to spread the removal over layers; per-layer: the same share of every layer; "
            "global: one ranking of the units of all layers; standardised: one ranking, by scores that are "
            "standardised in each block",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        units = units_of(shape)
        multiple = options.multiple(layer.neurons for layer in units)
        check_ratio(units, options.ratio, multiple)
        widths_of = even_widths if options.allocation == "per-layer" else spread_widths
        return plan_widths(shape, [width.kept for width in widths_of(units, options.ratio, multiple)])

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        units = units_of(ModelShape.of(model.checkpoint))
        multiple = options.multiple(layer.neurons for layer in units)
        journal = context.journal("scores")
        for layer in model.walk(journal, label="scoring weights"):
            for kind, values in mean_squares(model, layer)._asdict().items():
                if options.allocation == "standardised":
                    values = standardised(values)
                journal.state[f"{layer.index}.{kind}"] = values.cpu()
        scores = [
            Scores(*(journal.state[f"{index}.{kind}"] for kind in Scores._fields))
            for index in range(model.num_layers)
        ]
        if options.allocation == "per-layer":
            kept = best(scores, even_widths(units, options.ratio, multiple))
        else:
            kept = rank(scores, units, options.ratio, multiple)
        prune(model, kept, context)
        summary, details = removal(kept, units)
        return StepReport(f"{summary} (magnitude, {options.allocation}).", details)


def mean_squares(model: StreamedModel, layer: Layer) -> Scores:
    """The score of every unit of a layer: the mean of its squared weights."""
    anatomy, config = model.anatomy, model.config
    rows = projection_rows(config, layer.index)
    squares = {path: weight(linear).double().square() for path, linear in layer.linears.items()}

    def score(output: str, channels: torch.Tensor, *roles: str) -> torch.Tensor:
        if output not in squares:
            return torch.zeros(0, dtype=torch.float64)
        units = len(channels)
        parts = [squares[output].T[channels.flatten()].reshape(units, -1)]
        for role in roles:
            if role in rows:
                parts.append(squares[getattr(anatomy, role)][rows[role].flatten()].reshape(units, -1))
        return torch.cat(parts, 1).mean(1)

    neurons = torch.arange(len(rows["up"]))[:, None]
    groups = channels_of_groups(config, layer.index)
    return Scores(
        score(anatomy.attention_output, groups, "query", "key", "value"),
        score(anatomy.down, neurons, "gate", "up"),
    )
