"""Evaluate a model against the dense one: quality layer by layer, memory and speed in a fresh process."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from compress.engine.config import config_of
from compress.engine.loading import load
from compress.engine.logits import through_all_layers
from compress.engine.opening import open_checkpoint
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.evaluation.beforehand import (
    check_not_calibrated_on,
    check_same_tokenizer,
    evaluated_windows,
)
from compress.evaluation.fidelity import FidelityAccumulator
from compress.evaluation.foreign import Foreign, open_any
from compress.evaluation.harness.cards import TEXT, Exam, samples_folder, wanted_of
from compress.evaluation.harness.subject import Subject
from compress.evaluation.kick.bundled import told_by
from compress.evaluation.margin import check_margin
from compress.evaluation.measure import measure
from compress.evaluation.task import TaskEvaluation
from compress.evaluation.task_score import score
from compress.evaluation.timed import Settings, device_name
from compress.kernels.cpu.library import use
from compress.kernels.ops import REFERENCE, backend_of
from compress.report.card import add_evaluations
from compress.report.scorecard import Cost, ModelIdentity, Protocol, Scorecard
from compress.sources.find import ModelSource, find_model
from compress.sources.gguf import bytes_of
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.stacks import STACKS, prefix, steps_within
from compress.storage.lineage import now, read_lineage, versions
from compress.storage.sharded import is_sharded, read_sharded, served_files
from compress.storage.writer import write_tensors
from compress.system.cache import cache_folder
from compress.system.device import check_device, computing_on
from compress.system.memory import parse_memory

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

TEXTS_KEPT = 3
"""For so many texts the cache keeps what the dense model made of them."""

PROTOCOLS = ("protocol", "task_protocol", "harness_protocol")
"""What two scorecards of one model must share for one to stand for the other."""

TASK_REPETITIONS = 100
"""How often the forward pass on one input of a task is timed; it takes only milliseconds."""


def evaluate(
    model: str,
    *,
    revision: str | None = None,
    baseline: str | None = None,
    baseline_revision: str | None = None,
    task_file: str | None = None,
    text: str = "bundled:evaluation",
    context: int | None = None,
    windows: int | None = 32,
    device: str = "cpu",
    memory: str | int | None = None,
    kernel: str = "auto",
    suite: str = TEXT,
    tasks: Sequence[str] = (),
    include_path: Sequence[str | Path] = (),
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    chat_template: bool = False,
    samples: str | Path | None = None,
    margin: float = 0.01,
    judge: str | None = None,
    judge_revision: str | None = None,
    progress: Progress = lambda text, share: None,
) -> list[Scorecard]:
    """Evaluate a model against the dense model.

    If compress-model wrote the model, the result is added to its compression.json; a warning is logged if
    that file cannot be written. The dense model is not measured again if its own compression.json has the
    same evaluation.

    Args:
        model: folder, hub id or ``demo``.
        revision: branch, tag or commit of a model on the hub.
        baseline: the dense model; by default the model itself.
        baseline_revision: branch, tag or commit of a baseline on the hub.
        task_file: labelled examples for an encoder with a task head, scored in place of text (see
            :mod:`compress.calibration.text.examples`).
        text: the text to score, with the same sources as for calibration.
        context: tokens in a window; windows do not overlap, and the first token of each is not scored. By
            default 512, or as many as the dense model has positions for.
        windows: largest number of windows; None takes the whole text.
        device: where to compute and to measure.
        memory: evaluate the largest version that fits into this much memory, for example "90MB" (models
            stored in blocks only).
        kernel: what multiplies packed weights: "auto" (the best that works here), "reference" (plain torch),
            "cpu", or "cpu:" and a path.
        suite: what to do beside scoring text: "text" (nothing), "kick" or "kick-hub" (all questions of
            LLM-KICK), or "quick" (a few of them, if lm-eval is installed).
        tasks: tasks and groups of lm-eval to ask, in place of a suite's.
        include_path: folders with files of further tasks.
        fewshot: examples in front of each question; by default as many as the task says.
        limit: largest number of questions of each task; by default all, or as many as the suite says.
        batch_size: rows of a batch of questions, or "auto".
        chat_template: put each question into the model's chat template.
        samples: a folder to write each question with its answer to, as JSON lines.
        margin: the loss over all questions that does not matter, as a share of them.
        judge: folder or hub id of another model, which compares the answers to tasks without right ones with
            the dense model's.
        judge_revision: branch, tag or commit of a judge on the hub.
        progress: called with a text and the share that is done.

    Returns:
        The scorecard of the dense model and, if ``baseline`` is another model, that of ``model``.

    Raises:
        BadInput: the model is not a causal language model (with ``task_file``: not an encoder with a task
            head), vocabularies or labels differ, the file is not valid, the model was calibrated on this
            text, no version of it fits into ``memory``, there is no such kernel here, a task is unknown or
            broken, or the judge has nothing to judge or is of the models' family.
        CompressError: text, model or the data of a task cannot be downloaded, lm-eval is needed and missing,
            or the model puts out NaN.
    """
    check_margin(margin)
    how = {"fewshot": fewshot, "batch_size": batch_size, "chat_template": chat_template}
    needing = {"A judge": judge, "--samples": samples}
    wanted = wanted_of(suite, tasks, limit, include_path, task_file, needing, **how)
    if samples is not None:
        samples_folder(Path(samples))
    check_device(device)
    use(kernel)
    source = find_model(model, revision)
    dense_source = source if baseline is None else find_model(baseline, baseline_revision)
    opening = open_any if wanted else open_checkpoint
    checkpoint, dense = opening(source.folder), opening(dense_source.folder)
    read_lineage(dense_source.stored)  # read below; what is damaged is refused before the work
    if memory is not None:
        if isinstance(checkpoint, Foreign):
            raise BadInput(f"'{model}' is not stored in blocks, so it has one size; leave out --memory.")
        checkpoint = prefix(checkpoint, steps_within(checkpoint, parse_memory(memory)))
    same = dense.sha256 == checkpoint.sha256
    exam = None
    if wanted:
        subject = Subject(_name(dense_source), dense, device, kernel)
        name = _name(source, memory)
        if name == subject.name:  # samples are kept by name, which two folders may share
            name += f" {checkpoint.sha256[:8]}"
        other = Subject(name, checkpoint, device, kernel, memory)
        if same and other.words != subject.words:
            raise BadInput(
                f"'{source.id}' has the weights of the dense model '{dense_source.id}' but other files of a "
                "tokenizer, and models are told apart by their weights; evaluate each on its own."
            )
        judging = None if judge is None else find_model(judge, judge_revision).folder
        exam = Exam.of(wanted, subject, subject if same else other, progress, judging)
        for each in exam.questions[0]:
            check_not_calibrated_on(source, told_by(each.name), f"'{each.name}'", "leave that task out")
    if same and source.folder != dense_source.folder:
        log.warning(
            "'%s' has the same weights as the dense model '%s', so only that one is evaluated.",
            *(source.id, dense_source.id),
        )
    with computing_on(device):
        if isinstance(checkpoint, Foreign) or isinstance(dense, Foreign):
            foreign = checkpoint if isinstance(checkpoint, Foreign) else dense
            assert isinstance(foreign, Foreign)
            log.warning("No text is scored: %s", foreign.why)
            found = _Found({}, {}, {})
        elif task_file is None:
            found = _score_text(
                source, checkpoint, dense_source, dense, text, context, windows, device, progress
            )
        else:
            found = _score_task(source, checkpoint, dense, task_file, device, progress)
        if exam is not None:
            found.add(*exam.fields(margin, Path(samples) if samples is not None else None, progress))
    settings = Settings(device=device, kernel=kernel)
    dense_identity = ModelIdentity(name=_name(dense_source), sha256=dense.sha256)

    def scorecard(
        of: ModelSource, opened: Checkpoint | Foreign, scores: dict[str, Any], size: str | int | None = None
    ) -> Scorecard:
        return Scorecard(
            model=ModelIdentity(name=_name(of, size), sha256=opened.sha256),
            baseline=dense_identity,
            loads_with="transformers"
            if isinstance(opened, Foreign)
            else str(ModelShape.of(opened).loads_with),
            **scores,
            cost=_cost(of, opened, settings.model_copy(update={"memory": size}), progress, found.timed),
            when=now(),
            versions=versions(),
        )

    known = None if same else _known(dense_source, dense_identity, found.dense, device)
    cards = [known or scorecard(dense_source, dense, found.dense)]
    if not same:
        cards.append(scorecard(source, checkpoint, found.model, memory))
    if read_lineage(source.stored) is not None:
        try:
            add_evaluations(source.stored, [card.model_dump(mode="json") for card in cards])
        except OSError as error:  # a read-only folder must not lose minutes of measuring
            log.warning("The evaluation was not added to '%s' (%s).", source.stored, error.strerror or error)
    return cards


@dataclass(frozen=True)
class _Found:
    """The result of scoring both models.

    Attributes:
        dense, model: fields of the two scorecards.
        timed: arguments for `measure`.
    """

    dense: dict[str, Any]
    model: dict[str, Any]
    timed: dict[str, int]

    def add(self, dense: dict[str, Any], model: dict[str, Any]) -> None:
        """Add further fields."""
        self.dense.update(dense)
        self.model.update(model)


def _score_text(
    source: ModelSource,
    checkpoint: Checkpoint,
    dense_source: ModelSource,
    dense: Checkpoint,
    text: str,
    context: int | None,
    limit: int | None,
    device: str,
    progress: Progress,
) -> _Found:
    windows, context, positions = evaluated_windows(dense_source, dense, text, context, limit)
    check_not_calibrated_on(source, windows.document_hashes, f"'{windows.source}'")
    check_same_tokenizer(source.folder, dense_source.folder, windows.tokens[windows.mask].unique().tolist())
    accumulator = compare_streams(dense, checkpoint, windows, device, progress)
    protocol = Protocol(
        text=text,
        text_sha256=windows.sha256,
        context_tokens=context,
        stride_tokens=context,
        windows=len(windows),
        tokens_scored=accumulator.tokens_scored,
        compute_dtype="float32",
        seed=0,
        kernel=_kernel(dense, device),
        positions=positions,
    )
    other = protocol.model_copy(update={"kernel": _kernel(checkpoint, device)})
    return _Found(
        dense={"protocol": protocol, "fidelity": accumulator.dense_fidelity()},
        model={"protocol": other, "fidelity": accumulator.fidelity()},
        timed={},
    )


def _score_task(
    source: ModelSource,
    checkpoint: Checkpoint,
    dense: Checkpoint,
    task_file: str,
    device: str,
    progress: Progress,
) -> _Found:
    evaluation = TaskEvaluation(task_file, dense, device)
    check_not_calibrated_on(source, evaluation.file.document_hashes, f"'{evaluation.file.source}'")
    tokens = {token for inputs in evaluation.inputs for one in inputs for token in one.tokens}
    check_same_tokenizer(checkpoint.folder, dense.folder, sorted(tokens))

    def predictions(of: Checkpoint, label: str) -> list[Any]:
        return evaluation.predictions(of, lambda share: progress(label, share))

    expected = predictions(dense, "scoring the dense model")
    given = expected if dense.sha256 == checkpoint.sha256 else predictions(checkpoint, "scoring the model")

    def scores(of: Checkpoint, found: list[Any] | None) -> dict[str, Any]:
        return {
            "task_protocol": evaluation.protocol.model_copy(update={"kernel": _kernel(of, device)}),
            "task": score(evaluation.file, expected, found, evaluation.flops(of)),
        }

    return _Found(
        dense=scores(dense, None),
        model=scores(checkpoint, given),
        timed={"prefill_tokens": evaluation.protocol.mean_tokens, "repetitions": TASK_REPETITIONS},
    )


def _known(
    source: ModelSource, identity: ModelIdentity, scores: dict[str, Any], device: str
) -> Scorecard | None:
    """The dense model's scorecard in its own compression.json, if it was made and timed in the same way."""
    lineage = read_lineage(source.stored)
    cards = [Scorecard.model_validate(card) for card in (lineage.evaluations if lineage else [])]
    wanted = [identity, *(scores.get(name) for name in PROTOCOLS)]
    here = device_name(torch.device(device)), torch.get_num_threads()
    for card in reversed(cards):
        timed = card.cost.measured
        alike = [card.model, *(getattr(card, name) for name in PROTOCOLS)] == wanted
        if alike and timed is not None and (timed.device, timed.threads) == here:
            return card
    return None


def _cost(
    source: ModelSource,
    checkpoint: Checkpoint | Foreign,
    settings: Settings,
    progress: Progress,
    timed: dict[str, int],
) -> Cost:
    label = f"measuring memory and speed of {_name(source)}"
    progress(label, 0.0)
    cost = Cost(
        weight_bytes=bytes_of(source.folder) or _weight_bytes(checkpoint, settings),
        parameters=checkpoint.parameters
        if isinstance(checkpoint, Foreign)
        else ModelShape.of(checkpoint).parameters,
        measured=measure(source.folder, settings, **timed),
    )
    progress(label, 1.0)
    return cost


def _weight_bytes(checkpoint: Checkpoint | Foreign, settings: Settings) -> int:
    if isinstance(checkpoint, Foreign):
        return sum(file.stat().st_size for file in checkpoint.files)
    if settings.memory is not None:  # the files hold more than a prefix, so its tensors are counted
        return checkpoint.nbytes
    files = {Path(item.file) for item in checkpoint.sources.values()}
    if is_sharded(checkpoint.config):
        shards = enumerate(read_sharded(checkpoint.folder).shards)
        files.update(file for shard in shards for file in served_files(checkpoint.folder, *shard))
    return sum(file.stat().st_size for file in files)


def compare_streams(
    dense: Checkpoint,
    model: Checkpoint,
    windows: Windows,
    device: str = "cpu",
    progress: Progress | None = None,
) -> FidelityAccumulator:
    """Score ``model`` and ``dense`` on ``windows``.

    Both are streamed, so models may be larger than memory, except for what S3T trained. Logits are float32,
    and are compared window by window. The dense model's hidden states behind its last layer are cached for
    the next model.

    Raises:
        BadInput: ``dense`` is not a causal language model, or vocabularies differ.
        CompressError: a model puts out NaN or infinite values.
    """
    anatomy = ModelShape.of(dense).anatomy
    if anatomy.kind != "decoder" or anatomy.head is None:
        raise BadInput(
            f"'{dense.folder}' is not a causal language model, so it has no perplexity; score an encoder "
            "with a task head on labelled examples with --task-file."
        )
    same = dense.sha256 == model.sha256
    vocabulary = _check_same_vocabulary(dense, model)
    accumulator = FidelityAccumulator(vocabulary)
    first = _scored(dense, windows, device, progress, is_dense=True)
    second = first if same else _scored(model, windows, device, progress)
    with first() as expected, nullcontext(expected) if same else second() as found:
        for index in range(len(windows)):
            accumulator.add(expected(index), found(index), windows.tokens[index], windows.mask[index])
    return accumulator


Logits = Callable[[int, int], torch.Tensor]
"""Computes the logits of the positions from one to another in a window: float32 [positions, V]."""


def _scored(
    checkpoint: Checkpoint, windows: Windows, device: str, progress: Progress | None, is_dense: bool = False
) -> Callable[[], AbstractContextManager[Callable[[int], Logits]]]:
    """Score a model layer by layer.

    Returns:
        What opens its head, and gives a function from the index of a window to its logits. An ensemble is in
        memory as a whole while that is open.
    """
    if is_sharded(checkpoint.config):
        return lambda: nullcontext(_of_ensemble(load(checkpoint.folder, device, torch.float32), windows))
    streamed = StreamedModel(checkpoint, device, progress)
    label = "scoring the model"
    hidden = _cached_dense(streamed, windows) if is_dense else last_hidden(streamed, windows, label)

    @contextmanager
    def opened() -> Iterator[Callable[[int], Logits]]:
        with streamed.head() as head:
            yield lambda index: logits_of(head, hidden[index])

    return opened


def _of_ensemble(model: PreTrainedModel, windows: Windows) -> Callable[[int], Logits]:
    @torch.no_grad()
    def logits(index: int) -> Logits:
        tokens = windows.tokens[index : index + 1].to(model.device)
        found = model(input_ids=tokens, use_cache=False).logits[0]
        return lambda start, stop: found[start:stop]

    return logits


def _check_same_vocabulary(dense: Checkpoint, model: Checkpoint) -> int:
    """The number of tokens that both models know."""
    sizes = config_of(dense).vocab_size, config_of(model).vocab_size
    if sizes[0] != sizes[1]:
        raise BadInput(
            f"'{model.folder}' has a vocabulary of {sizes[1]:,} tokens and the dense model one of "
            f"{sizes[0]:,}, so they cannot be compared; give the model that was compressed as --baseline."
        )
    return sizes[0]


def logits_of(
    head: Callable[[torch.Tensor], Any], hidden: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """A function that computes the logits of some positions, because those of a window can be gigabytes."""
    return lambda start, stop: head(hidden[None, start:stop]).logits[0]


def last_hidden(model: StreamedModel, windows: Windows, label: str) -> torch.Tensor:
    """Hidden states behind the last layer, float32 [N, S, D]."""
    return through_all_layers(model, windows, label).hidden.read(0, len(windows))


def _cached_dense(model: StreamedModel, windows: Windows) -> torch.Tensor:
    """Hidden states behind the dense model's last layer, float32 [N, S, D]; the cache keeps a few texts."""
    device = torch.device(model.device).type
    computed_by = [torch.__version__, transformers.__version__, device, _kernel(model.checkpoint, device)]
    key = hashlib.sha256(
        " ".join([model.checkpoint.sha256, windows.sha256, *computed_by]).encode()
    ).hexdigest()
    folder = cache_folder() / "dense-hidden"
    file = folder / f"{key[:32]}.safetensors"
    if file.exists():
        os.utime(file)
        return load_file(file)["hidden"]
    hidden = last_hidden(model, windows, "scoring the dense model")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors({"hidden": hidden}, file)
        for old in sorted(folder.glob("*.safetensors"), key=_age)[TEXTS_KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.debug("The dense model's hidden states were not cached: %s", error)
    return hidden


def _age(file: Path) -> float:
    """Seconds since a file was used; one that another process has just removed is the oldest."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _name(source: ModelSource, size: str | int | None = None) -> str:
    folder, name = Path(source.id).expanduser(), source.id
    if folder.is_dir():
        name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return name if size is None else f"{name} in {size}"


def _kernel(checkpoint: Checkpoint, device: str) -> str:
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        return "torch"
    return REFERENCE if quantization.get("quant_method") in STACKS else backend_of(device)
