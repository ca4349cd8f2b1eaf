"""Load an exported folder with the programs that it is for, and compare what they compute."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.engine.key_values import KEY
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.windows import Windows
from compress.errors import CompressError
from compress.export.model import ExportedModel
from compress.kernels.cpu.library import REFERENCE, using
from compress.pipeline.promise import in_words, obstacle, promised_logits
from compress.pipeline.reload import EIGHT_BIT_INPUTS, HALF_PRECISION, SAME_ARITHMETIC, probe_of
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.loaders import LoadsWith
from compress.storage.lineage import Verification

NOT_ASKED = "--no-verify was given"


def verify_folder(model: ExportedModel, folder: Path, device: str) -> Verification:
    """Compare a model with its export, which this package and the promised programs load.

    The programs are held against our own reading of the files they are given. The figures are of the model
    that was exported, so that they also count what the format rounds.

    Raises:
        CompressError: the programs cannot load the folder, or compute something else than we do.
    """
    exported, probe = Checkpoint.open(folder), probe_of(model.checkpoint)
    before, read = both_logits(model, _without_cache_rounding(exported), probe, device)
    shape = ModelShape.of(exported)
    who, causal = shape.loads_with, shape.anatomy.kind == "decoder"
    if reason := obstacle(shape, device):
        found = compared(before, read, "compress-model", probe.tokens.numel(), causal)
        return found.model_copy(update={"runtime": in_words(who), "not_tried": reason})
    loaded = promised_logits(folder, probe.tokens)
    check_same(read, loaded, in_words(who), allowed_for(who))
    return compared(before, loaded, in_words(who), probe.tokens.numel(), causal)


def both_logits(
    model: ExportedModel, exported: Checkpoint, probe: Windows, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a model and of what it was exported as, both by our own reading.

    Raises:
        CompressError: they differ by more than the rounding of weights to 16 bits, or of what the model
            rounds when it runs, explains.
    """
    with using(REFERENCE):
        before, after = (streamed_logits(each, probe, device) for each in (model.checkpoint, exported))
    rounds = model.rounds_inputs or model.checkpoint.config.get(KEY)
    check_same(before, after, "compress-model", EIGHT_BIT_INPUTS if rounds else HALF_PRECISION)
    return before, after


def compared(
    before: torch.Tensor, after: torch.Tensor, runtime: str, tokens: int, causal: bool = True
) -> Verification:
    """What a runtime computed, held against the model that was exported.

    Args:
        before, after: logits [N, S, V], or hidden states of a model without a vocabulary head.
        runtime: the programs that computed ``after``, with versions.
        tokens: how many were given.
        causal: whether these are logits, so that there is a KL divergence.
    """
    kl = agreement = None
    if causal:
        ours, theirs = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl = max(0.0, float((ours.exp() * (ours - theirs)).sum(-1).mean()))
        agreement = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    return Verification(
        runtime=runtime, kl=kl, agreement=agreement, difference=difference(before, after), tokens=tokens
    )


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Root mean square difference, as a share of the standard deviation of ``before``."""
    return float((before - after).square().mean().sqrt() / before.std(correction=0))


def check_same(read: torch.Tensor, loaded: torch.Tensor, runtime: str, allowed: float) -> None:
    """Make sure that what a program computes with the exported files is what was expected of them.

    Args:
        read, loaded: logits that are expected, and that the program computed.
        runtime: the program, with its version.
        allowed: the difference that passes, as a share of the spread of ``read``.

    Raises:
        CompressError: it does not; nothing may be published then.
    """
    found = difference(read, loaded)
    if not found <= allowed:
        raise CompressError(
            f"{runtime} computes something else with the exported files than the model does (logits differ "
            f"by {found:.2g} of their spread); nothing was published. If it is the fault of that version, "
            "install another one, or use --no-verify to write them without this check."
        )


def allowed_for(who: LoadsWith) -> float:
    """The difference that passes between us and the promised programs (see `compress.pipeline.reload`)."""
    if who.eight_bit_inputs:
        return EIGHT_BIT_INPUTS
    return HALF_PRECISION if who.in_half_precision else SAME_ARITHMETIC


def _without_cache_rounding(checkpoint: Checkpoint) -> Checkpoint:
    """The model as other programs run it, which do not quantize keys and values."""
    config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    return Checkpoint(checkpoint.folder, config, checkpoint.tensors, checkpoint.sources)
