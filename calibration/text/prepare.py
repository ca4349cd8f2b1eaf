"""Prepare the calibration text that a recipe asks for: windows, inputs of an encoder, or generated text."""

from __future__ import annotations

from collections.abc import Sequence

from compress.anatomy import anatomy_of
from compress.calibration.text.encoder_inputs import calibration_inputs
from compress.calibration.text.generate import GENERATE, generated_windows
from compress.calibration.text.records import Records
from compress.calibration.text.settings import DEFAULT_SIZE, Calibration, TextSize
from compress.calibration.text.windows import calibration_windows
from compress.engine.config import config_of
from compress.engine.skeleton import skeleton, window_length
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from compress.system.progress import Progress

FEWEST_TOKENS = 16
"""Tokens below which calibration is refused. Methods that need more say so themselves."""


def prepare_calibration(
    wanted: Calibration,
    seed: int,
    checkpoint: Checkpoint,
    device: str,
    progress: Progress,
    size: TextSize = DEFAULT_SIZE,
    forget: Sequence[Records] = (),
) -> Windows:
    """The windows that ``wanted`` describes, for the model of ``checkpoint``.

    Args:
        wanted: where the text comes from, and how much of it is used.
        seed: used if ``wanted`` has no seed of its own.
        checkpoint: the model, whose tokenizer is used and which may generate the text.
        device: where the model generates text.
        progress: called with a text and the share done (0 to 1) while text is generated.
        size: how much text is used where ``wanted`` does not say. Windows are then no longer than the model
            has positions for.
        forget: what a step of the recipe forgets; text that tells it is left out.

    Raises:
        BadInput: the source does not fit the model, cannot be read, or gives fewer than `FEWEST_TOKENS`.
        CompressError: the source cannot be fetched.
    """
    windows = _prepared(wanted, seed, checkpoint, device, progress, size, forget)
    if windows.num_tokens < FEWEST_TOKENS:
        raise BadInput(
            f"There are only {windows.num_tokens} tokens to calibrate on, which say nothing about a model; "
            "give more text, and ask for thousands of tokens (nsamples times seqlen)."
        )
    return windows


def _prepared(
    wanted: Calibration,
    seed: int,
    checkpoint: Checkpoint,
    device: str,
    progress: Progress,
    size: TextSize,
    forget: Sequence[Records],
) -> Windows:
    seed = seed if wanted.seed is None else wanted.seed
    encoder = anatomy_of(config_of(checkpoint)).kind == "encoder"
    if encoder and wanted.source == GENERATE:
        raise BadInput("An encoder cannot generate calibration text; choose another source or give a file.")
    if encoder:
        return calibration_inputs(checkpoint, wanted.sized(size), seed)
    nsamples = wanted.nsamples or size.nsamples
    seqlen = window_length(skeleton(config_of(checkpoint)), wanted.seqlen, size.seqlen)
    if wanted.source == GENERATE:
        if wanted.chat_template:
            raise BadInput("Generated calibration text has no conversations; do not ask for a chat template.")
        if forget:
            raise BadInput(
                "The model would write its calibration text before it forgets, and could write what is to be "
                "forgotten; calibrate on another text."
            )
        return generated_windows(checkpoint, nsamples, seqlen, seed, device, progress)
    return calibration_windows(
        load_tokenizer(checkpoint.folder),
        wanted.source,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=wanted.chat_template,
        forget=forget,
    )
