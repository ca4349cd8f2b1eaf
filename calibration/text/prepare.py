"""The calibration windows that a recipe asks for."""

from __future__ import annotations

from compress.anatomy import anatomy_of
from compress.calibration.text.encoder_inputs import calibration_inputs
from compress.calibration.text.generate import SOURCE, generated_windows
from compress.calibration.text.settings import Calibration
from compress.calibration.text.windows import calibration_windows
from compress.engine.config import config_of
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from compress.system.progress import Progress


def prepare_calibration(
    wanted: Calibration, seed: int, checkpoint: Checkpoint, device: str, progress: Progress
) -> Windows:
    """The windows that ``wanted`` describes, for the model of ``checkpoint``.

    Args:
        wanted: where the text comes from, and how much of it is taken.
        seed: of the order of the documents, where ``wanted`` gives none.
        checkpoint: the model, whose tokenizer cuts the text and which may generate it.
        device: where the model generates text.
        progress: told a text and the share done.

    Raises:
        BadInput: the source does not fit the model, or cannot be read.
        CompressError: the source cannot be fetched.
    """
    seed = seed if wanted.seed is None else wanted.seed
    encoder = anatomy_of(config_of(checkpoint)).kind == "encoder"
    if encoder and wanted.source == SOURCE:
        raise BadInput("An encoder cannot generate calibration text; name a text or a file.")
    if encoder:
        return calibration_inputs(checkpoint, wanted, seed)
    if wanted.source == SOURCE:
        if wanted.chat_template:
            raise BadInput("Generated calibration text has no conversations; leave the chat template out.")
        return generated_windows(checkpoint, wanted.nsamples, wanted.seqlen, seed, device, progress)
    return calibration_windows(
        load_tokenizer(checkpoint.folder),
        wanted.source,
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=seed,
        chat_template=wanted.chat_template,
    )
