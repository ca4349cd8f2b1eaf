"""Who's Harry Potter: the model learns what it would have predicted had it never seen a text."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from compress.engine.skeleton import check_positions
from compress.engine.tokenizer import load_tokenizer
from compress.method import Method, Paper, StepReport
from compress.system.files import write_atomically
from compress.unlearning.parts.anchored import Material, read_material
from compress.unlearning.parts.anchors import read_anchors
from compress.unlearning.parts.generic_labels import (
    Labels,
    Predict,
    Reference,
    generic_labels,
    labelled,
    predictor,
)
from compress.unlearning.parts.losses import lengths, negative_log_likelihood
from compress.unlearning.parts.options import SETS, TrainingOptions, check_trainable
from compress.unlearning.parts.rounding import Roundings
from compress.unlearning.parts.training import (
    Batch,
    Example,
    merged,
    scored_logits,
    train,
    trainable,
    whole_model,
    write_changed,
)

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

log = logging.getLogger(__name__)

ROLE = "forget"
"""The role of the sequences in a batch of the training."""

REINFORCING, TRAINING = "reinforcing", "training"
"""Names of the two trainings, and of the folders of their saved states."""


class HarryPotter(Method["HarryPotter.Options"]):
    """Train the model on the text to forget, with labels that a model would give that has not seen it.

    1. A copy of the model is trained on the text: the reinforced model, which holds what is particular to the
       text even more likely.
    2. Anchors, what the text alone has (names above all), are replaced by generic stand-ins: the translation.
    3. With v_base the logits of the model on the translation, and v_reinforced those of the reinforced model
       on the original, at corresponding places (see `align`),

           v_generic = v_base - alpha ReLU(v_reinforced - v_base)        (1)

       and the label of a token is argmax v_generic. Tokens without a corresponding place have no label.
    4. Consistency: where a block has an anchor again, it has no label; behind an anchor, ``suppression`` is
       taken off the logits of its stand-in (`Block`).
    5. The model, as it was, is trained on the original text with these labels.

    With alpha 0 the reinforced model has no say: labels are the model's own predictions on the translation.
    If all labels are what it predicts on the original anyway, as with alpha 0 and no anchors, there is
    nothing to learn, and no weight changes.

    Others found that such a model answers questions about the text much as before, keeps what it knows in its
    hidden states, and loses neighbouring knowledge ("Eight Methods to Evaluate Robust Unlearning in LLMs",
    arXiv:2402.16835): audit the result with open questions and after compression.
    """

    name = "harry-potter"
    family = "unlearning"
    paper = Paper("Who's Harry Potter? Approximate Unlearning in LLMs", "2310.02238")
    needs_calibration = False
    needs_package = "peft"

    class Options(TrainingOptions):
        retain: str | None = Field(  # type: ignore[assignment]  # it can do without
            None, description=f"records to retain, in which proposed anchors are rare: {SETS}"
        )
        anchors: str | None = Field(
            None,
            description="a .json file, {anchor: stand-in, ...}, or a .csv file of two columns; by default "
            "names and rare words of the records to forget, with stand-ins from a list",
        )
        alpha: NonNegativeFloat = Field(
            5.0, description="how strongly what the reinforced model prefers is taken off the logits"
        )
        delta_reference: Reference = Field(
            "translated", description="the text on which the model is compared with the reinforced model"
        )
        suppression: NonNegativeFloat = Field(
            5.0,
            description="taken off the logits of the stand-ins of anchors that the text has named already",
        )
        reinforce: Literal["lora", "full"] = Field(
            "lora", description="train low-rank updates of the reinforced model, or all its weights"
        )
        reinforce_epochs: PositiveInt = Field(3, description="number of passes of the reinforced model")
        reinforce_learning_rate: PositiveFloat = Field(
            5e-4, description="learning rate of the reinforced model at the first step"
        )
        epochs: PositiveInt = Field(4, description="number of passes over the records to forget")

        def content(self) -> dict[str, str]:
            listed = {} if self.anchors is None else {"anchors": read_anchors(self.anchors).sha256}
            return super().content() | listed

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "Who's Harry Potter", options)
        if options.anchors is not None:
            read_anchors(options.anchors)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        tokenizer = load_tokenizer(context.source)
        sets = (options.forget, options.retain, options.anchors)
        material = read_material(*sets, tokenizer, options.seqlen, context.generator())
        longest = max(
            len(text.ids) for block in material.blocks for text in (block.original, block.translated)
        )
        check_positions(model.model, longest, "use a smaller seqlen, or shorter stand-ins")
        labels, reinforcing = kept_labels(material, model, options, context)
        details = material.details | {"reinforcing": reinforcing} | counts(material, labels)
        if details["changed_labels"] == 0:
            log.warning("Every label is what the model predicts anyway: there is nothing to unlearn.")
            return StepReport("every label is what the model predicts anyway; nothing changed.", details)
        examples: list[Example] = [
            {ROLE: labelled(block, found, sequence.id)}
            for sequence, block, found in zip(material.sequences, material.blocks, labels)
            if block.targets
        ]
        details |= teach(examples, material, model, options, context)
        return StepReport(
            f"{len(material.anchors.entries)} anchors, {details['labels']} labels, "
            f"{details['changed_labels']} of them not what the model predicted; "
            f"{details['training']['steps']} steps, {details['changed_weights']} weights differ.",
            details,
        )


@dataclass(frozen=True)
class Reinforcing:
    """How the reinforced model is trained (see `TrainingOptions`)."""

    train: str
    rank: int
    learning_rate: float
    epochs: int
    batch_size: int
    max_gradient_norm: float
    gradient_checkpointing: bool


def kept_labels(
    material: Material, model: StreamedModel, options: HarryPotter.Options, context: StepContext
) -> tuple[list[Labels], dict[str, Any]]:
    """The labels of all blocks and metadata of the reinforced model's training, which a killed run keeps."""
    file = context.folder / "labels.json"
    if not file.exists():
        labels, reinforcing = label(material, model, options, context)
        write_atomically(file, json.dumps({"reinforcing": reinforcing, "labels": labels}))
    saved = json.loads(file.read_text())
    return [Labels(*pair) for pair in saved["labels"]], saved["reinforcing"]


def label(
    material: Material, model: StreamedModel, options: HarryPotter.Options, context: StepContext
) -> tuple[list[tuple[list[int], list[int]]], dict[str, Any]]:
    """Train the reinforced model, and take the labels of all blocks from it and from the model.

    Returns:
        For every block the generic labels and the model's own predictions, one for each target; and metadata
        of the training.
    """
    base, reinforced, details = two_models(material, model, options, context)
    labels: list[tuple[list[int], list[int]]] = []
    for number, block in enumerate(material.blocks):
        context.progress("labelling", number / len(material.blocks))
        if not block.targets:
            labels.append(([], []))
            continue
        found = generic_labels(
            block,
            base,
            reinforced,
            alpha=options.alpha,
            suppression=options.suppression,
            reference=options.delta_reference,
        )
        labels.append((found.generic, found.own))
    return labels, details


def two_models(
    material: Material, model: StreamedModel, options: HarryPotter.Options, context: StepContext
) -> tuple[Predict, Predict | None, dict[str, Any]]:
    """The model and the reinforced model, and metadata of its training; with alpha 0 there is none.

    With low-rank updates the two are one model in memory, whose updates are switched on and off.
    """
    whole = whole_model(model, context)
    if options.alpha == 0:
        return predictor(whole), None, {"steps": 0}
    how = Reinforcing(
        train=options.reinforce,
        rank=options.rank,
        learning_rate=options.reinforce_learning_rate,
        epochs=options.reinforce_epochs,
        batch_size=options.batch_size,
        max_gradient_norm=options.max_gradient_norm,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    trained = trainable(whole, model.anatomy.linear_paths, how, context.seed)
    examples = [{ROLE: sequence} for sequence in material.sequences]
    details = train(trained, examples, material.pad, mean_loss, how, context, REINFORCING)
    reinforced = predictor(trained)
    if options.reinforce == "full":
        return predictor(whole_model(model, context)), reinforced, details

    def base(tokens: Sequence[int]) -> torch.Tensor:
        with trained.disable_adapter():  # type: ignore[operator]  # of peft's model
            return reinforced(tokens)

    return base, reinforced, details


def teach(
    examples: list[Example],
    material: Material,
    model: StreamedModel,
    options: HarryPotter.Options,
    context: StepContext,
) -> dict[str, Any]:
    """Train the model on generic labels, and write what changed into the draft.

    Returns:
        Metadata of the training, of the codes that it changed, and of what changed.
    """
    whole = whole_model(model, context)
    trained = trainable(whole, model.anatomy.linear_paths, options, context.seed)
    roundings = Roundings.of(whole, model.anatomy, options.survive)
    training = train(
        trained, examples, material.pad, mean_loss, options, context, TRAINING, [roundings.follow()]
    )
    crossed = roundings.finish(model)
    return {"training": training, "crossed": crossed, **write_changed(merged(trained), model, context)}


def mean_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean over sequences of the mean cross-entropy of their labels, in float32, nats.

    A sequence counts the same whatever else is in its batch.
    """
    logits, labels = scored_logits(model, batch[ROLE])
    return (negative_log_likelihood(logits, labels) / lengths(labels)).mean()


def counts(material: Material, labels: Sequence[Labels]) -> dict[str, int]:
    """How many tokens have labels, and for how many of these it is not what the model predicts on the text,
    and not what the text says."""
    changed = other = 0
    for block, found in zip(material.blocks, labels):
        said = [block.original.ids[target.position] for target in block.targets]
        changed += sum(mine != own for mine, own in zip(found.generic, found.own))
        other += sum(mine != word for mine, word in zip(found.generic, said))
    return {
        "tokens": sum(len(block.original.ids) for block in material.blocks),
        "labels": sum(len(block.targets) for block in material.blocks),
        "changed_labels": changed,
        "labels_unlike_the_text": other,
    }
