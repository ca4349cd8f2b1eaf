"""What is found out before an evaluation, or before the run whose result is to be evaluated."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from compress.calibration.text.windows import evaluation_windows
from compress.engine.config import config_of
from compress.engine.opening import open_checkpoint
from compress.engine.skeleton import longest_input, skeleton, window_length
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.evaluation.foreign import open_any
from compress.evaluation.harness.cards import Exam, wanted_of
from compress.evaluation.harness.subject import Subject
from compress.evaluation.kick.bundled import told_by
from compress.evaluation.task import TaskEvaluation
from compress.sources.find import ModelSource, find_model
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import read_lineage
from compress.system.progress import Progress

CONTEXT = 512
"""Tokens in a window if the user does not say how many and the model has positions for so many."""


def check_evaluation(
    model: str,
    revision: str | None,
    *,
    suite: str,
    tasks: Sequence[str],
    include_path: Sequence[str | Path],
    fewshot: int | None,
    limit: int | None,
    batch_size: int | str,
    chat_template: bool,
    task_file: str | None,
    text: str,
    context: int | None,
    windows: int,
    progress: Progress,
) -> frozenset[str]:
    """Make sure that what is made of a model can be evaluated against it, before it is made.

    Args:
        model, revision: the dense model.
        progress: called with a text and the share that is done.

    The others are those of `compress.evaluate`.

    Returns:
        Hashes of the documents of its text and tasks.

    Raises:
        BadInput, CompressError: as `compress.evaluate`, where it concerns text, tasks and the dense model.
    """
    wanted = wanted_of(
        *(suite, tasks, limit, include_path, task_file),
        fewshot=fewshot,
        batch_size=batch_size,
        chat_template=chat_template,
    )
    source = find_model(model, revision)
    dense = open_any(source.folder) if wanted else open_checkpoint(source.folder)
    documents: frozenset[str] = frozenset()
    if wanted:
        subject = Subject(source.id, dense)
        exam = Exam.of(wanted, subject, subject, progress)
        documents = documents.union(*(told_by(each.name) for each in exam.questions[0]))
    if not isinstance(dense, Checkpoint):
        return documents  # transformers runs it, and no text is scored
    if task_file is not None:
        return TaskEvaluation(task_file, dense).file.document_hashes
    return documents | evaluated_windows(source, dense, text, context, windows)[0].document_hashes


def evaluated_windows(
    source: ModelSource, dense: Checkpoint, text: str, context: int | None, limit: int | None
) -> tuple[Windows, int, int | None]:
    """The windows of a text for a dense model, their tokens, and its positions where these are fewer.

    Args:
        source, dense: the model.
        text: a source as for calibration.
        context: tokens of a window; None takes `CONTEXT`, or as many as the model has positions for.
        limit: largest number of windows; None takes all.

    Raises:
        BadInput: there is no such text, or it is too short.
    """
    built = skeleton(config_of(dense))
    context = window_length(built, context, CONTEXT)
    positions = longest_input(built)
    windows = evaluation_windows(load_tokenizer(source.folder), text, context, limit)
    return windows, context, positions if context > positions else None


def check_same_tokenizer(folder: Path, dense: Path, tokens: Sequence[int]) -> None:
    """Make sure that tokens which the dense model's tokenizer made mean the same to the model.

    A model without a tokenizer of its own takes those of the dense model.

    Args:
        folder, dense: of the two models.
        tokens: the ids in the text.

    Raises:
        BadInput: the model's tokenizer has other ids for them.
    """
    if folder == dense:
        return
    try:
        own = load_tokenizer(folder).get_vocab()
    except BadInput:
        return
    words = load_tokenizer(dense).convert_ids_to_tokens(list(tokens))
    for token, word in zip(tokens, words, strict=True):
        if own.get(word) != token:
            raise BadInput(
                f"The tokenizer of '{folder}' does not number tokens as the dense model's does ({word!r} is "
                f"{token} there and {own.get(word, 'unknown')} here), so they cannot be compared; give the "
                "model that was compressed as --baseline."
            )


def check_not_calibrated_on(
    source: ModelSource, documents: Set[str], text: str, advice: str = "evaluate it on another text"
) -> None:
    """Make sure that a model has not seen the text that it is to be scored on.

    Args:
        source: the model; its record and those of the models it was made of say what they were calibrated on.
        documents: hashes of those of the text.
        text: its name, for the message.
        advice: what to do, for the message.

    Raises:
        BadInput: it has seen some of them.
    """
    lineage = read_lineage(source.stored)
    chain = lineage.chain() if lineage else []
    calibrated = {name for link in chain for name in (link.calibration or {}).get("document_sha256", [])}
    if common := calibrated & documents:
        raise BadInput(f"'{source.id}' was calibrated on {len(common)} of the documents of {text}; {advice}.")
