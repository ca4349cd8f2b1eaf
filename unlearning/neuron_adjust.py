"""Neuron Adjust: map the neurons that tell text to forget from text to retain to the latter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from compress.anatomy import Anatomy, layer_shapes
from compress.calibration.statistics.moments import Moments
from compress.calibration.text.records import sequences
from compress.engine.adjusting import SMALLEST, Adjuster, probability
from compress.engine.at_inference import ADJUSTER, AtInference, NeuronAdjustSettings
from compress.engine.stream import Seen, StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.storage.tensors import TensorInfo
from compress.unlearning.parts.options import ForgetOptions
from compress.unlearning.parts.probes import both_sets, check_generates, windows_of

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.method import StepContext
    from compress.storage.checkpoint import Checkpoint


Statistics = dict[int, dict[str, Tensor]]
"""Layer -> the buffers of its `Adjuster`: name -> [I]."""


class NeuronAdjust(Method["NeuronAdjust.Options"]):
    """Adjust pre-activations of the MLPs, in every pass, where they look like text to forget.

    The pre-activation x of a neuron is what the MLP's activation reads: the output of the gate projection, or
    of the first projection of an MLP without a gate:

    1. Measure: mu_f, sigma_f over the real tokens of the text to forget, and mu_r, sigma_r over those of the
       text to retain, for every neuron of every layer.
    2. Select the neurons with the largest mu_f - mu_r among those of all layers (``share``).
    3. At inference, with N_f and N_r the Gaussian densities at x: where N_f >= N_r, replace x with
       probability N_f / (N_f + N_r) by x' = mu_r - sigma_r (x - mu_f) / sigma_f.

    No weight changes. The statistics are in the model's files, and `compress.load` adjusts by them; no other
    program loads the model. They are taken in float64 and kept in float32.

    Differences from the published code: sigma is the standard deviation, and not the variance; sigma_f is
    that of the text to forget, and not its mean; every value has a draw of its own, which follows from the
    seed, the layer, the neuron, the token and its position, and so does not depend on the batch; densities
    are compared by their logarithms. After later steps of the recipe all of it is measured again.
    """

    name = "neuron-adjust"
    family = "unlearning"
    paper = Paper("Effective Skill Unlearning through Intervention and Abstention", "2503.21730")
    needs_calibration = False
    at_inference = True

    class Options(ForgetOptions):
        share: float = Field(0.015, gt=0, le=1, description="share of the neurons of all layers to adjust")
        seqlen: PositiveInt = Field(256, description="tokens in a piece of a long text")

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_generates(shape, "Neuron Adjust")
        if (there := AtInference.of(shape.config)) is not None and there.neuron_adjust is not None:
            raise BadInput("A model can adjust neurons once; leave one of the steps out.")
        shapes = layer_shapes(shape.pretrained_config)
        infos = {
            _stored(shape.anatomy, index, leaf): TensorInfo(
                "BOOL" if leaf == "selected" else "F32", (layer.intermediate_size,)
            )
            for index, layer in enumerate(shapes)
            for leaf in ("selected", *Adjuster.STATISTICS)
            if layer.intermediate_size
        }
        if not infos:
            raise BadInput("No layer of this model has an MLP, so it has no neurons to adjust.")
        # The seed of the run is not known here.
        return shape.derive(_settings(0).declared(shape.config), add=infos)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        return self._measure(model, options, context, None)

    def refresh(
        self, model: StreamedModel, options: Options, context: StepContext, before: Checkpoint
    ) -> StepReport:
        return self._measure(model, options, context, before)

    def _measure(
        self, model: StreamedModel, options: Options, context: StepContext, before: Checkpoint | None
    ) -> StepReport:
        tokenizer = load_tokenizer(context.source)
        sets = dict(zip(("forget", "retain"), both_sets(options), strict=True))
        texts = {
            what: windows_of(sequences(records, tokenizer, options.seqlen), records.source)
            for what, records in sets.items()
        }
        moments = {what: measure(model, windows, context, what) for what, windows in texts.items()}
        found = select(moments["forget"], moments["retain"], options.share)
        all_statistics = [found]
        if before is not None and (old := _read(model, before)) is not None:
            all_statistics.append(old)
        rates = {
            what: replaced(model, windows, all_statistics, context, what) for what, windows in texts.items()
        }
        context.draft.write(
            {
                _stored(model.anatomy, index, leaf): value
                for index, buffers in found.items()
                for leaf, value in buffers.items()
            }
        )
        context.draft.config = _settings(context.seed).declared(context.draft.config)
        chosen = [int(buffers["selected"].sum()) for buffers in found.values()]
        details: dict[str, Any] = {
            **{what: records.described for what, records in sets.items()},
            "neurons": sum(chosen),
            "of": sum(len(buffers["selected"]) for buffers in found.values()),
            "neurons_by_layer": dict(zip(map(str, found), chosen, strict=True)),
            "tokens": {what: windows.num_tokens for what, windows in texts.items()},
            "replaced": {what: values[0] for what, values in rates.items()},
        }
        now = details["replaced"]
        summary = (
            f"{details['neurons']:,} of {details['of']:,} neurons are adjusted at inference, which replaces "
            f"{now['forget']:.0%} of their values in text to forget and {now['retain']:.0%} in text to retain"
        )
        if before is not None:
            summary += "; measured again after the later steps"
            details["replaced_by_statistics_before_later_steps"] = (
                {what: values[1] for what, values in rates.items()} if len(all_statistics) > 1 else None
            )
        if len(all_statistics) > 1:
            summary += f", by whose result the first statistics would replace {rates['forget'][1]:.0%} and "
            summary += f"{rates['retain'][1]:.0%}"
        return StepReport(summary, details)


def measure(
    model: StreamedModel, windows: Windows, context: StepContext, what: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every pre-activation over real tokens.

    Returns:
        Layer -> mu and sigma, float64 [I] each, for the layers that have an MLP.
    """
    journal, shapes = context.journal(f"measuring-{what}"), layer_shapes(model.config)
    stream = model.stream(windows, journal.folder)
    for layer in model.walk(journal, stream, label=f"measuring text to {what}"):
        width = shapes[layer.index].intermediate_size
        moments = Moments(width, model.device)

        def look(seen: Seen, moments: Moments = moments) -> None:
            moments.add(seen.real(seen.inputs))

        stream.advance(layer, {model.anatomy.activation: look} if width else None)
        if width:
            journal.state[f"{layer.index}.mean"] = moments.mean.cpu()
            journal.state[f"{layer.index}.deviation"] = moments.variance.clamp(min=0).sqrt().cpu()
    return {
        index: (journal.state[f"{index}.mean"], journal.state[f"{index}.deviation"])
        for index, shape in enumerate(shapes)
        if shape.intermediate_size
    }


def select(
    forget: dict[int, tuple[Tensor, Tensor]], retain: dict[int, tuple[Tensor, Tensor]], share: float
) -> Statistics:
    """The statistics of every layer, with the neurons of the largest mu_f - mu_r of all layers selected.

    Args:
        forget, retain: layer -> mu and sigma, float64 [I] each.
        share: of all neurons; at least one is selected.
    """
    gaps = torch.cat([forget[index][0] - retain[index][0] for index in forget])
    count = max(1, round(share * len(gaps)))
    selected = torch.zeros(len(gaps), dtype=torch.bool)
    selected[gaps.sort(descending=True, stable=True).indices[:count]] = True
    widths = [len(forget[index][0]) for index in forget]
    found: Statistics = {}
    for (index, (mean, deviation)), chosen in zip(forget.items(), selected.split(widths), strict=True):
        values = (mean, deviation, *retain[index])
        buffers = dict(zip(Adjuster.STATISTICS, (value.float() for value in values), strict=True))
        for name in ("forget_deviation", "retain_deviation"):
            buffers[name] = buffers[name].clamp(min=SMALLEST)
        found[index] = {"selected": chosen.clone(), **buffers}
    return found


def replaced(
    model: StreamedModel,
    windows: Windows,
    all_statistics: Sequence[Statistics],
    context: StepContext,
    what: str,
) -> list[float]:
    """The share of the values of selected neurons that would be replaced, on average over draws.

    Args:
        model: without adjustment.
        windows: a text.
        all_statistics: several ways to adjust.
        context: of the step.
        what: the text is for, for messages.

    Returns:
        The share for each of ``all_statistics``.
    """
    journal = context.journal(f"checking-{what}")
    journal.state["sums"] = torch.zeros(len(all_statistics), dtype=torch.float64)
    stream = model.stream(windows, journal.folder)
    for layer in model.walk(journal, stream, label=f"checking on text to {what}"):
        sums = journal.state["sums"].clone()

        def look(seen: Seen, index: int = layer.index, sums: Tensor = sums) -> None:
            x = seen.real(seen.inputs)
            for number, statistics in enumerate(all_statistics):
                buffers = {name: value.to(x.device) for name, value in statistics[index].items()}
                chosen = buffers.pop("selected").nonzero()[:, 0]
                values = [value[chosen] for value in buffers.values()]
                sums[number] += probability(x[:, chosen], *values).sum(dtype=torch.float64).cpu()

        stream.advance(layer, {model.anatomy.activation: look} if layer.index in all_statistics[0] else None)
        journal.state["sums"] = sums
    counts = [sum(int(layer["selected"].sum()) for layer in found.values()) for found in all_statistics]
    return [
        float(total) / (windows.num_tokens * count)
        for total, count in zip(journal.state["sums"], counts, strict=True)
    ]


def _settings(seed: int) -> AtInference:
    return AtInference(neuron_adjust=NeuronAdjustSettings(seed=seed))


def _stored(anatomy: Anatomy, index: int, leaf: str) -> str:
    return f"{anatomy.layer_name(index)}.{ADJUSTER}.{leaf}"


def _read(model: StreamedModel, before: Checkpoint) -> Statistics | None:
    """The statistics in an earlier model; None if its layers have other widths than those of ``model``."""
    widths = [shape.intermediate_size for shape in layer_shapes(model.config)]
    named = [
        {leaf: _stored(model.anatomy, index, leaf) for leaf in ("selected", *Adjuster.STATISTICS)}
        for index in range(len(widths))
    ]
    shapes = [
        before.tensors[names["selected"]].shape if names["selected"] in before else (0,) for names in named
    ]
    layers = {model.anatomy.layer_index(name) for name in before.tensors}
    if shapes != [(width,) for width in widths] or max(layers) >= len(widths):
        return None
    return {
        index: {leaf: before.read(name) for leaf, name in names.items()}
        for index, names in enumerate(named)
        if widths[index]
    }
