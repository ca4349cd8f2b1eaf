"""Wanda-sp: the baseline of the FLAP paper, which scores heads and neurons by weights times inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.engine.shape import ModelShape
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.allocation import best, check_ratio, even_widths, removal, units_of
from compress.pruning.parts.channels import channel_statistics, channels_of, unit_scores
from compress.pruning.parts.options import ParameterRatio, WidthMultiple
from compress.pruning.parts.width import plan_widths, prune

if TYPE_CHECKING:
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class WandaSp(Method["WandaSp.Options"]):
    """Prune in every layer the heads and MLP neurons whose weights times inputs are smallest.

    Wanda's score of a weight is |W_oj| ||X_j||, with X_j the input channel j over all tokens. The score of a
    channel is the mean over the outputs o of its output projection (of attention or MLP). The score of a
    key-value head is the mean over the channels of its query heads (section 4 of the FLAP paper). Every layer
    loses the same share of its parameters, and nothing compensates the loss.
    """

    name = "wanda-sp"
    family = "pruning"
    paper = Paper("A Simple and Effective Pruning Approach for Large Language Models", "2306.11695")

    class Options(WidthMultiple, ParameterRatio):
        """What to remove and which widths are allowed, nothing else."""

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        units = units_of(shape)
        multiple = options.multiple(layer.neurons for layer in units)
        check_ratio(units, options.ratio, multiple)
        widths = even_widths(units, options.ratio, multiple)
        return plan_widths(shape, [width.kept for width in widths])

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        units = units_of(ModelShape.of(model.checkpoint))
        statistics = channel_statistics(model, "WIFN", context)
        scores = [
            unit_scores(model, index, *channels_of(model, index, statistics))
            for index in range(model.num_layers)
        ]
        multiple = options.multiple(layer.neurons for layer in units)
        kept = best(scores, even_widths(units, options.ratio, multiple))
        prune(model, kept, context)
        summary, details = removal(kept, units)
        return StepReport(f"{summary} (Wanda-sp).", details)
