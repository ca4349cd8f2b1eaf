"""NPO (COLM 2024): negative preference optimisation, gradient ascent that fades as a record is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from compress.method import Method, Paper, StepReport
from compress.unlearning.parts import losses
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    losses_before,
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


class NPO(Method["NPO.Options"]):
    """Train the model to like the records to forget less than it did before.

    With N = −log π(y | x) the negative log-likelihood of an answer, summed over its tokens, and N_ref the
    same before unlearning, the loss of a record to forget is

        −(2/β) log σ(β (N − N_ref))  =  (2/β) log(1 + (π / π_ref)^β)

    Its gradient is that of −N times a weight that begins at 1 and falls to 0 as the answer becomes unlikely.
    N_ref is computed once, layer by layer, so no second model is in memory. The retain term is that of
    gradient difference.
    """

    name = "npo"
    family = "unlearning"
    paper = Paper(
        "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", "2404.05868"
    )
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        beta: PositiveFloat = Field(
            0.1, description="inverse temperature; the smaller, the nearer to gradient ascent"
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "NPO", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)
        before = losses_before(model, sets.forget, context, FORGET)

        def forget(trained: nn.Module, batch: Batch) -> Tensor:
            return losses.npo(nll_of(trained, batch, FORGET), before(batch[FORGET]), options.beta)

        with retaining(model, sets, options, context) as retain:
            return unlearn(model, sets, forget, retain, options, context)
