"""Steps that act at inference, which measure again when the steps after them have changed the model."""

from __future__ import annotations

from dataclasses import dataclass

from compress.engine.at_inference import AtInference, is_statistic, undeclared
from compress.errors import BadInput
from compress.method import Method, MethodOptions
from compress.pipeline.recipe import validated
from compress.pipeline.registry import find_method
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import Step, read_lineage


@dataclass(frozen=True)
class Acting:
    """A step whose method acts at inference.

    Attributes:
        method, options: of the step.
        before: the model with what the step measured.
        number: of the step in the recipe; None if the recipe's model was made by it.
    """

    method: Method
    options: MethodOptions
    before: Checkpoint
    number: int | None = None


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The model without what it does at inference."""
    if AtInference.of(checkpoint.config) is None:
        return checkpoint
    tensors = {name: info for name, info in checkpoint.tensors.items() if not is_statistic(name)}
    sources = {name: checkpoint.sources[name] for name in tensors}
    return Checkpoint(checkpoint.folder, undeclared(checkpoint.config), tensors, sources)


def inherited_acting(checkpoint: Checkpoint) -> list[Acting]:
    """The steps that made a model act at inference, from the record in its folder, in their order.

    Raises:
        BadInput: there is no record of them.
    """
    if (section := AtInference.of(checkpoint.config)) is None:
        return []
    lineage = read_lineage(checkpoint.folder)
    steps = [step for link in lineage.chain() for step in link.steps] if lineage else []
    found = {step.method: step.options for step in steps if step.method in section.methods}
    if missing := [name for name in section.methods if name not in found]:
        raise BadInput(
            f"'{checkpoint.folder}' unlearns by {missing[0]} at inference, which must measure again after "
            "every change, but its folder does not say with which options; compress the model it was made "
            "from, in one recipe with that step."
        )
    acting = []
    for name, options in found.items():
        method = find_method(name)
        acting.append(Acting(method, validated(method.Options, dict(options), name), checkpoint))
    return acting


def measured_again(first: Step, again: Step) -> Step:
    """The record of a step that acts at inference, after it was refreshed."""
    peaks = [peak for peak in (first.peak_memory_bytes, again.peak_memory_bytes) if peak is not None]
    return again.model_copy(
        update={
            "details": {**again.details, "before_later_steps": first.details},
            "seconds": round(first.seconds + again.seconds, 3),
            "peak_memory_bytes": max(peaks, default=None),
            "resumed": first.resumed or again.resumed,
        }
    )
