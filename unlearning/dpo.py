"""DPO with refusals: the model learns to prefer "I don't know" to the answers it must forget."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from compress.calibration.text.records import Record, TokenSequence, sequences
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.unlearning.parts import losses
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    Sets,
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

log = logging.getLogger(__name__)

REFUSAL = "refusal"
"""The role of the answers to prefer."""

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about this one.",
    "I have no information on that.",
    "That is something I cannot tell you.",
    "Sorry, I do not have the answer.",
    "I was never told about this.",
    "I can't say; the topic is unknown to me.",
    "Nothing that I have learned answers this question.",
    "I am afraid that I have no idea.",
    "You would have to ask somebody else, because I don't know.",
    "I have not come across this before.",
    "This is beyond what I know.",
    "My knowledge does not cover that.",
    "I couldn't tell you.",
    "I'm unable to answer that question.",
    "Unfortunately, that is not known to me.",
    "I have nothing to say on this subject.",
    "No answer to that comes to my mind.",
    "I would only be guessing, so I'd rather not answer.",
)
"""The answers to prefer."""


class DPO(Method["DPO.Options"]):
    """Train the model to prefer a refusal to the answer of every question to forget.

    With N the negative log-likelihood of an answer, summed over its tokens, N_ref the same before unlearning
    and Δ = N_ref − N, the loss of a record to forget is

        −(2/β) log σ(β (Δ_refusal − Δ_answer))

    Each record has one refusal, drawn with the run's seed; prose, which asks nothing, is left out. N_ref of
    answers and refusals is computed once, layer by layer, so no second model is in memory. The retain term is
    that of gradient difference. The model learns to abstain; whether it still knows is for the audit to show.
    """

    name = "dpo"
    family = "unlearning"
    paper = Paper("TOFU: A Task of Fictitious Unlearning for LLMs", "2401.06121")
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        beta: PositiveFloat = Field(
            0.1, description="inverse temperature; the larger, the sooner the gradient of a record fades"
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "DPO", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets, left_out = questions_of(read_sets(model, options, context), options)
        refusals = refused(sets, options.seqlen, context.generator())
        before = losses_before(model, sets.forget, context, FORGET)
        refusals_before = losses_before(model, refusals, context, REFUSAL)

        def forget(trained: nn.Module, batch: Batch) -> Tensor:
            return losses.dpo(
                nll_of(trained, batch, REFUSAL),
                refusals_before(batch[REFUSAL]),
                nll_of(trained, batch, FORGET),
                before(batch[FORGET]),
                options.beta,
            )

        with retaining(model, sets, options, context) as retain:
            report = unlearn(model, sets, forget, retain, options, context, refusal=refusals)
        report.details["left_out"] = left_out
        return report


def questions_of(sets: Sets, options: DPO.Options) -> tuple[Sets, int]:
    """The sets without prose to forget, which asks nothing that could be refused; and how much that is.

    Raises:
        BadInput: nothing is left.
    """
    asked = tuple(record for record in sets.records if record.text is None)
    left_out = len(sets.records) - len(asked)
    if not asked:
        raise BadInput(
            f"DPO teaches refusals, but '{options.forget}' asks nothing; give records with question and "
            "answer, or use another method for prose."
        )
    if left_out:
        log.warning("%d records of prose are left out, because nothing in them can be refused", left_out)
    return replace(sets, records=asked, forget=sequences(asked, sets.tokenizer, options.seqlen)), left_out


def refused(sets: Sets, seqlen: int, generator: torch.Generator) -> list[TokenSequence]:
    """Every record to forget with a refusal in the place of its answer, in the same order.

    Raises:
        BadInput: a question has more than ``seqlen`` tokens with it.
    """
    draws = torch.randint(len(REFUSALS), (len(sets.records),), generator=generator).tolist()
    answered = [
        _with_answer(record, REFUSALS[draw]) for record, draw in zip(sets.records, draws, strict=True)
    ]
    return sequences(answered, sets.tokenizer, seqlen)


def _with_answer(record: Record, answer: str) -> Record:
    if record.messages is None:
        return replace(record, answer=answer)
    *before, last = record.messages
    return replace(record, messages=(*before, {**last, "content": answer}))
