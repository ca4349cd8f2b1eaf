"""What the gradient baselines share: their sets, the terms of their losses, and the training itself.

The loss of a step is γ · mean(forget term of the records to forget) + α · mean(retain term of as many records
to retain).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.calibration.text.records import Record, TokenSequence, check_apart, read_records, sequences
from compress.engine.skeleton import check_positions
from compress.engine.tokenizer import load_tokenizer
from compress.method import StepReport
from compress.unlearning.parts.beside import RETAIN, Beside
from compress.unlearning.parts.losses import kl_to_reference, lengths, negative_log_likelihood
from compress.unlearning.parts.options import SETS, TrainingOptions
from compress.unlearning.parts.reference import Reference
from compress.unlearning.parts.rounding import Roundings
from compress.unlearning.parts.training import (
    Batch,
    merged,
    scored_logits,
    train,
    trainable,
    whole_model,
    write_changed,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

FORGET = "forget"
"""The role of the sequences to forget in a batch."""

Term = Callable[[nn.Module, Batch], Tensor]
"""A term of the loss: of the model that is trained and a batch of B examples, float32 [B]."""


class WeightedOptions(TrainingOptions):
    """The sets, and how much their terms count."""

    retain: str | None = Field(  # type: ignore[assignment]  # these methods can do without
        None, description=f"records to retain, unless retain_weight is 0: {SETS}"
    )
    forget_weight: PositiveFloat = Field(1.0, description="weight of the loss of the records to forget")
    retain_weight: NonNegativeFloat = Field(
        6.0,
        description="weight of the loss of the records to retain; with 0 nothing is trained on them, and no "
        "such set is needed",
    )

    @model_validator(mode="after")
    def _has_what_it_weighs(self) -> Self:
        if self.retain_weight and self.retain is None:
            raise ValueError(
                "give records to retain, or set retain_weight to 0 to train on the records to forget alone"
            )
        return self


class RetainLossOptions(WeightedOptions):
    """How records are retained."""

    retain_loss: Literal["nll", "kl"] = Field(
        "nll",
        description="nll: mean negative log-likelihood of the records to retain; kl: mean KL divergence from "
        "what the model predicted before",
    )


@dataclass(frozen=True)
class Sets:
    """What is forgotten and what is retained.

    Attributes:
        records: to forget.
        forget: the same as sequences; pieces of a long text share its id.
        retain: sequences to retain; none if nothing is trained on them.
        tokenizer: of the model.
        pad: the token that fills up batches.
        details: number and sha256 of the records, for the report.
    """

    records: tuple[Record, ...]
    forget: list[TokenSequence]
    retain: list[TokenSequence]
    tokenizer: PreTrainedTokenizerBase
    pad: int
    details: dict[str, Any]


def read_sets(model: StreamedModel, options: WeightedOptions, context: StepContext) -> Sets:
    """Read both sets.

    Raises:
        BadInput: a set cannot be read, is empty, shares records with the other one, or has nothing to
            learn; or the model has no positions for so long a text.
    """
    forget = read_records(options.forget, FORGET)
    tokenizer = load_tokenizer(context.source)
    details: dict[str, Any] = {FORGET: forget.described}
    kept: list[TokenSequence] = []
    if options.retain is not None:
        retain = read_records(options.retain, RETAIN)
        check_apart(forget, retain)
        details[RETAIN] = retain.described
        if options.retain_weight:
            kept = sequences(retain, tokenizer, options.seqlen)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = sequences(forget, tokenizer, options.seqlen)
    longest = max(len(sequence.tokens) for sequence in [*parts, *kept])
    check_positions(model.model, longest, "use a smaller seqlen")
    return Sets(forget.entries, parts, kept, tokenizer, pad or 0, details)


def nll_of(model: nn.Module, batch: Batch, role: str) -> Tensor:
    """N of the sequences of a role (see `negative_log_likelihood`): float32 [B]."""
    return negative_log_likelihood(*scored_logits(model, batch[role]))


def mean_nll(model: nn.Module, batch: Batch, role: str) -> Tensor:
    """The mean loss of the scored tokens of each sequence of a role, nats: float32 [B]."""
    return nll_of(model, batch, role) / lengths(batch[role]["labels"])


@contextmanager
def retaining(
    model: StreamedModel, sets: Sets, options: RetainLossOptions, context: StepContext
) -> Iterator[Term]:
    """The term that ``retain_loss`` names, for the length of a ``with`` block."""
    if options.retain_loss == "nll" or not sets.retain:
        yield lambda trained, batch: mean_nll(trained, batch, RETAIN)
        return
    before = Reference(model, sets.retain, context, RETAIN)
    with model.head() as head:

        def term(trained: nn.Module, batch: Batch) -> Tensor:
            part = batch[RETAIN]
            reference = before.logits(head, before.rows(part))
            return kl_to_reference(*scored_logits(trained, part), reference)

        yield term


def losses_before(
    model: StreamedModel, parts: Sequence[TokenSequence], context: StepContext, name: str
) -> Callable[[dict[str, Tensor]], Tensor]:
    """N of some sequences before unlearning, computed once: part of a batch -> float32 [B]."""
    before = Reference(model, parts, context, name)
    with model.head() as head:
        losses = before.losses(head)
    return lambda part: losses[torch.tensor(before.rows(part), device=losses.device)]


def unlearn(
    model: StreamedModel,
    sets: Sets,
    forget: Term,
    retain: Term,
    options: WeightedOptions,
    context: StepContext,
    choose: Callable[[PreTrainedModel], nn.Module] | None = None,
    **roles: Sequence[TokenSequence],
) -> StepReport:
    """Train the model on both terms, and write what changed into the draft.

    Args:
        model: as it is stored.
        sets: what to forget and to retain.
        forget, retain: the terms.
        options: of the method.
        context: of the step.
        choose: marks what is trained, as `trainable` does; None: all weights, or updates of all linears.
        roles: sequences beside those to forget, in the same order: role -> sequences.

    Raises:
        CompressError: the loss became NaN or infinite.
    """

    steps = options.epochs * math.ceil(len(sets.forget) / options.batch_size)
    beside = Beside(sets.retain, options.batch_size, steps, sets.pad, context.generator())

    def loss(trained: nn.Module, batch: Batch) -> Tensor:
        batch = beside.add_to(batch)
        with parametrize.cached():  # both terms take the weights that were rounded once
            total = options.forget_weight * forget(trained, batch).mean()
            if RETAIN in batch:
                total = total + options.retain_weight * retain(trained, batch).mean()
        return total

    whole = whole_model(model, context)
    if choose is None:
        trained = trainable(whole, model.anatomy.linear_paths, options, context.seed)
    else:
        trained = choose(whole)
    parts = {FORGET: sets.forget, **roles}
    examples = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    roundings = Roundings.of(whole, model.anatomy, options.survive)
    callbacks = [beside.follow(), roundings.follow()]
    training = train(trained, examples, sets.pad, loss, options, context, callbacks=callbacks)
    crossed = roundings.finish(model)
    changed = write_changed(merged(trained), model, context)
    summary = (
        f"{len(sets.records)} records unlearned in {training['steps']} steps, loss "
        f"{training['first_loss']:.4g} to {training['last_loss']:.4g}; {changed['changed_weights']} weights "
        "differ"
    )
    for grid, number in crossed.items():
        summary += f", {number} in their code on {grid}"
    return StepReport(f"{summary}.", {**sets.details, "training": training, "crossed": crossed, **changed})
