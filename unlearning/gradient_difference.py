"""Gradient difference: ascend on what is forgotten, descend on what is retained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.method import Method, Paper, StepReport
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    mean_nll,
    read_sets,
    retaining,
    unlearn,
)
from compress.unlearning.parts.options import check_trainable

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class GradientDifference(Method["GradientDifference.Options"]):
    """Train the model to make the records to forget unlikely and those to retain likely.

    With N / T the mean negative log-likelihood of a sequence's scored tokens, the loss is

        −γ · mean over records to forget of N / T  +  α · mean over records to retain of N / T

    or, with ``--retain-loss kl``, α times the KL divergence from what the model predicted before. With
    ``--retain-weight 0`` it is gradient ascent alone. The first term has no lower bound: training that goes
    on for too long takes everything else with it.
    """

    name = "gradient-difference"
    family = "unlearning"
    paper = Paper("Continual Learning and Private Unlearning", "2203.12817")
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        """The sets, the weights of the terms, and how to train."""

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "Gradient difference", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)
        with retaining(model, sets, options, context) as retain:
            return unlearn(
                model,
                sets,
                lambda trained, batch: -mean_nll(trained, batch, FORGET),
                retain,
                options,
                context,
            )
