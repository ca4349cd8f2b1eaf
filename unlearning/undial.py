"""UNDIAL (NAACL 2025): the model is distilled from itself, with the token to forget made less likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from compress.method import Method, Paper, StepReport
from compress.unlearning.parts import losses
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    read_sets,
    retaining,
    unlearn,
)
from compress.unlearning.parts.options import check_trainable
from compress.unlearning.parts.reference import Reference
from compress.unlearning.parts.training import scored_logits

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext
    from compress.unlearning.parts.training import Batch


class Undial(Method["Undial.Options"]):
    """Train the model on its own predictions, in which the logit of every token to forget is lowered.

    With z the logits of the model before unlearning where it predicts the token x_t of an answer to forget,
    the loss is the cross-entropy, the mean over the tokens of the answer, to

        softmax(z − β · onehot(x_t))

    Unlike gradient ascent this has a minimum, so training does not run away. The hidden states behind z are
    computed once, layer by layer; beside the model that is trained only a frozen head is in memory. The paper
    trains on nothing to retain (``--retain-weight 0``), which costs utility.
    """

    name = "undial"
    family = "unlearning"
    paper = Paper(
        "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        "2402.10052",
    )
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        beta: PositiveFloat = Field(
            10.0, description="how far the logit of a token to forget is lowered in the target, nats"
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "UNDIAL", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)
        before = Reference(model, sets.forget, context, FORGET)
        with retaining(model, sets, options, context) as retain, model.head() as head:

            def forget(trained: nn.Module, batch: Batch) -> Tensor:
                part = batch[FORGET]
                reference = before.logits(head, before.rows(part))
                return losses.undial(*scored_logits(trained, part), reference, options.beta)

            return unlearn(model, sets, forget, retain, options, context)
