"""SimNPO (2024): NPO without a reference model, with losses per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from compress.method import Method, Paper, StepReport
from compress.unlearning.parts import losses
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    nll_of,
    read_sets,
    retaining,
    unlearn,
)
from compress.unlearning.parts.options import check_trainable

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext
    from compress.unlearning.parts.training import Batch


class SimNPO(Method["SimNPO.Options"]):
    """Train the model until the tokens of the records to forget are unlikely, whatever they were before.

    With N the negative log-likelihood of an answer and T its number of tokens, the loss of a record to forget
    is

        −(2/β) log σ(β (N / T − δ))

    Against NPO, long answers count no more than short ones, and answers that were unlikely from the start
    have little gradient. The retain term is that of gradient difference. The paper takes a forget weight of
    0.125 and a margin of 0, with which records stay likelier than for a model that never learned them.
    """

    name = "simnpo"
    family = "unlearning"
    paper = Paper(
        "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", "2410.07163"
    )
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        beta: PositiveFloat = Field(4.5, description="inverse temperature")
        margin: NonNegativeFloat = Field(
            2.0,
            description="δ, nats per token: the larger, the more unlikely a record must become before its "
            "gradient fades",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "SimNPO", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)

        def forget(trained: nn.Module, batch: Batch) -> Tensor:
            length = losses.lengths(batch[FORGET]["labels"])
            return losses.simnpo(nll_of(trained, batch, FORGET), length, options.beta, options.margin)

        with retaining(model, sets, options, context) as retain:
            return unlearn(model, sets, forget, retain, options, context)
