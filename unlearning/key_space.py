"""Key Space Detection: refuse to answer where a prompt's key is among those of prompts to forget."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from compress.anatomy import layer_shapes
from compress.calibration.text.records import Records, TokenSequence, sequences
from compress.engine.abstaining import Check
from compress.engine.at_inference import KEY_SPACE, AtInference, KeySpaceSettings, key_layer
from compress.engine.stream import Seen, StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.storage.tensors import TensorInfo
from compress.unlearning.parts.detector import Detector, calibrate, promised, rates, roc
from compress.unlearning.parts.options import ForgetOptions
from compress.unlearning.parts.probes import both_sets, check_generates, prompts_of, split, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.engine.shape import ModelShape
    from compress.method import StepContext
    from compress.storage.checkpoint import Checkpoint


log = logging.getLogger(__name__)

FEWEST = {"forget": 4, "retain": 2}
"""Prompts without which nothing can be fitted and held out."""

FITTED = 2
"""Keys without which there is no standard deviation."""


class KeySpace(Method["KeySpace.Options"]):
    """Make the model abstain: a prompt whose key lies among those of the prompts to forget gets a refusal.

    This is abstention, and not erasure. The weights still hold what is to be forgotten, and a program that
    ignores the detector would say it:

    1. The key x of a prompt is the input of the last layer's down projection at its last token.
    2. From the keys of prompts to forget: mu_j and sigma_j of every coordinate j, and
       k = max |x_j - mu_j| / sigma_j over these prompts and all coordinates.
    3. A prompt is refused if |x_j - mu_j| <= h k sigma_j for every coordinate, with h the width.

    The prompt of a question or conversation is what comes before the answer; that of prose is the prose.

    The width is calibrated here. Some prompts to forget are held out of step 2; h is wide enough for the
    share ``coverage`` of them, but no wider than half of the prompts to retain allow for the share
    ``false_positives`` of others to be expected inside (split conformal prediction), which takes 99 prompts
    for 1 %. The other half only checks it. The detector's ROC on what step 2 has not seen is reported.

    Texts of a batch are judged one by one, and their answers replaced through the logits, so that
    ``generate`` writes the refusal and ends. ``compress.load`` puts the detector on the model, and no other
    program loads it. What the model computes for a text that is given, such as its perplexity, changes only
    behind its last token.

    Differences from the published code: decisions and flags belong to texts, and not to the first of a batch
    and to the model; sigmas near 0 are left out; the width is calibrated, and not chosen by hand. After later
    steps of the recipe all of it is measured again.
    """

    name = "key-space"
    family = "unlearning"
    paper = Paper("Effective Skill Unlearning through Intervention and Abstention", "2503.21730")
    needs_calibration = False
    at_inference = True

    class Options(ForgetOptions):
        check: Check = Field(
            "prompt-only", description="judge by the last token of a prompt, or also by every token after it"
        )
        refusal: str = Field(
            "Sorry, I cannot answer that.", min_length=1, description="the answer to refuse by"
        )
        coverage: float = Field(
            0.99, gt=0, le=1, description="share of the held-out prompts to forget that the width is for"
        )
        false_positives: float = Field(
            0.01, ge=0, lt=1, description="largest expected share of prompts to retain that are refused"
        )
        held_out: float = Field(
            0.25, gt=0, lt=1, description="share of the prompts to forget that the width is calibrated on"
        )
        seqlen: PositiveInt = Field(256, description="tokens in a piece of a long text")

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_generates(shape, "Key Space Detection")
        if (there := AtInference.of(shape.config)) is not None and there.key_space is not None:
            raise BadInput("A model can have one detector of keys; leave one of the steps out.")
        settings = AtInference(key_space=KeySpaceSettings(check=options.check))
        config = settings.declared(shape.config)
        index = key_layer(shape.pretrained_config)
        name = f"{shape.anatomy.layer_name(index)}.{KEY_SPACE}"
        width = layer_shapes(shape.pretrained_config)[index].intermediate_size
        infos = {f"{name}.{leaf}": TensorInfo("F32", (width,)) for leaf in ("mean", "deviation")}
        return shape.derive(config, add=infos)

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
        refusal = refusal_tokens(options.refusal, sets["forget"], tokenizer)
        prompts = {
            what: prompts_of(sequences(records, tokenizer, options.seqlen)) for what, records in sets.items()
        }
        for what, fewest in FEWEST.items():
            if len(prompts[what]) < fewest:
                raise BadInput(
                    f"Key Space Detection needs at least {fewest} prompts to {what}, and "
                    f"'{sets[what].source}' has {len(prompts[what])}."
                )
        generator = context.generator()
        parts = {
            what: split(len(prompts[what]), share, generator)
            for what, share in (("forget", options.held_out), ("retain", 0.5))
        }
        if (fitted := len(parts["forget"][0])) < FITTED:
            raise BadInput(
                f"With a held_out of {options.held_out:g}, {fitted} of {len(prompts['forget'])} prompts to "
                f"forget would be left to fit, but a space takes {FITTED}; use a smaller one."
            )
        keys = {what: keys_of(model, each, context, what) for what, each in prompts.items()}
        (fit, held_out), (rest, calibrated) = (
            (keys[what][first], keys[what][second]) for what, (first, second) in parts.items()
        )
        detector = Detector.of(fit)
        radius = calibrate(
            detector.distances(held_out),
            detector.distances(calibrated),
            options.coverage,
            options.false_positives,
        )
        expected = promised(options.false_positives, len(calibrated))
        if expected > options.false_positives:
            log.warning(
                "%d prompts to retain to calibrate on are too few to promise %.3g%% of false positives; "
                "%.2g%% are expected.",
                *(len(calibrated), 100 * options.false_positives, 100 * expected),
            )
        index = key_layer(model.config)
        name = f"{model.anatomy.layer_name(index)}.{KEY_SPACE}"
        context.draft.write({f"{name}.mean": detector.mean, f"{name}.deviation": detector.deviation})
        settings = KeySpaceSettings(
            check=options.check, refusal=refusal, k=detector.k, width=radius / detector.k
        )
        context.draft.config = AtInference(key_space=settings).declared(context.draft.config)
        details: dict[str, Any] = {
            **{what: records.described for what, records in sets.items()},
            "layer": index,
            "coordinates": int((detector.deviation > 0).sum()),
            "of": len(detector.deviation),
            "k": detector.k,
            "width": settings.width,
            "expected_false_positives": round(expected, 6),
            "prompts": {
                "forget": {"fitted": len(fit), "held_out": len(held_out)},
                "retain": {"calibrated": len(calibrated), "checked": len(rest)},
            },
            **rates(detector, settings.k * settings.width, held_out, calibrated, rest),
            "roc": roc(detector.distances(held_out), detector.distances(keys["retain"])),
        }
        summary = (
            f"abstains, and erases nothing: refuses {details['refused']['forget_held_out']:.0%} of held-out "
            f"prompts to forget and {details['refused']['retain_checked']:.1%} of prompts to retain, with a "
            f"width of {settings.width:.3g} (AUC {details['roc']['auc']:.3f})"
        )
        if before is not None:
            summary += "; measured again after the later steps"
            old = Detector.read(before, name, len(detector.mean))
            section = AtInference.of(before.config)
            assert section is not None
            assert section.key_space is not None
            first = section.key_space
            details["with_statistics_before_later_steps"] = (
                rates(old, first.k * first.width, held_out, calibrated, rest) if old is not None else None
            )
            if old is not None:
                missed = details["with_statistics_before_later_steps"]["false_negatives"]
                now = details["false_negatives"]
                summary += f", on whose result the first statistics would miss {missed:.0%} (now {now:.0%})"
        return StepReport(summary, details)


def keys_of(model: StreamedModel, prompts: list[TokenSequence], context: StepContext, what: str) -> Tensor:
    """The input of the last down projection at the last token of each prompt: float32 [N, I]."""
    windows, index = windows_of(prompts, what), key_layer(model.config)
    journal = context.journal(f"keys-{what}")
    stream = model.stream(windows, journal.folder)
    for layer in model.walk(journal, stream, stop=index + 1, label=f"keys of text to {what}"):
        if layer.index < index:
            stream.advance(layer)
            continue
        found: list[Tensor] = []

        def take(seen: Seen, found: list[Tensor] = found) -> None:
            last = (seen.mask.sum(1) - 1).to(seen.inputs.device)
            found.append(seen.inputs[torch.arange(len(last), device=last.device), last].float().cpu())

        stream.look(layer, {model.anatomy.down: take})
        journal.state["keys"] = torch.cat(found)
    return journal.state["keys"]


def refusal_tokens(refusal: str, records: Records, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a refusal, the end of the text last.

    It begins with a space where it follows a question of `PROMPT`, as answers do.

    Raises:
        BadInput: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("The tokenizer has no end-of-text token, so a refusal would never end.")
    chat = all(record.messages is not None for record in records.entries)
    text = refusal if chat else f" {refusal}"
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
