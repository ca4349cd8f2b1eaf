"""Executing a recipe: plan, then step after step, then one artefact, checked by reloading it.

All work happens in a hidden folder beside the output, which the finished artefact leaves by a rename. A
killed run leaves only that folder behind, and the same command goes on from its last finished layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

import compress
from compress.artefact import (
    Lineage,
    Parent,
    ReloadCheck,
    Result,
    Step,
    check_output,
    now,
    publish,
    read_lineage,
    recover,
    versions,
    write_lineage,
    write_model,
)
from compress.calibration.windows import Windows, calibration_windows
from compress.checkpoint import DTYPE_NAMES, Checkpoint, Draft
from compress.device import check_device
from compress.errors import BadInput, CompressError
from compress.files import write_atomically
from compress.memory import available_memory, peak_memory, reset_peak_memory
from compress.method import Method, MethodOptions
from compress.modeling import config_of
from compress.models import ModelSource, find_model
from compress.plan import Plan, make_plan
from compress.recipe import Recipe
from compress.stream import Journal, StreamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROBE_TOKENS = 48
PARITY = 1e-3
ROOM = (
    1.05  # free disk space asked for, over the predicted bytes of one copy in the work folder and the result
)

Progress = Callable[[str, float], None]


@dataclass
class Run:
    """What a method is given besides the model.

    Attributes:
        draft: the model under construction; the method writes its changes there.
        calibration: windows of tokens, or None if the method needs none.
        seed: for every random choice.
        folder: room for the step's files; it goes away with the run.
        device: where to compute.
        progress: told a text and the share done.
    """

    draft: Draft
    calibration: Windows | None
    seed: int
    folder: Path
    device: str
    progress: Progress

    def journal(self, name: str) -> Journal:
        """The journal of one walk of the step."""
        return Journal(self.folder / name, self.draft)

    def generator(self) -> torch.Generator:
        """A fresh random generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for missing and broken tokenizer files
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"The model folder '{folder}' has no tokenizer that can be loaded ({reason})."
        ) from error


def open_model(recipe: Recipe) -> tuple[ModelSource, Checkpoint]:
    """The recipe's model, found and opened with the recipe's dtype."""
    source = find_model(recipe.model, recipe.revision)
    dtype = DTYPE_NAMES[getattr(torch, recipe.dtype)] if recipe.dtype else None
    return source, Checkpoint.open(source.folder, dtype)


def execute(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> Lineage:
    """Run a recipe and write its artefact to ``output``.

    Args:
        recipe: what to do.
        output: a folder that does not exist, is empty, or may be replaced (``overwrite``).
        resume: True goes on with an interrupted run, False throws it away, None goes on if it is the same
            run and refuses otherwise.
        device: where to compute.
        progress: told a text and the share of the current part that is done.

    Raises:
        BadInput: the recipe does not fit the model, the text, the device or the output folder.
        CompressError: the work failed: no disk space, broken activations, or a reload that does not match.
    """
    output = output.absolute()
    work = output.with_name(f".{output.name}.partial")
    if output.parent.is_dir():
        with _locked(output):
            _tidy(output, work)
    check_output(output, overwrite)
    check_device(device)
    source, checkpoint = open_model(recipe)
    if source.folder.resolve().is_relative_to(output.resolve()):
        raise BadInput(f"The output '{output}' holds the model to compress; use another -o.")
    plan = make_plan(checkpoint, recipe.steps)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        check_output(output, overwrite)  # again: another run may have finished meanwhile
        if resume is False:
            _discard(work)
        _check_disk(work, plan)
        return _execute(recipe, source, checkpoint, plan, output, work, device, progress)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other runs away from ``output``. The lock goes with the process, however it ends."""
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BadInput(f"Another run is writing to '{output}'; wait for it, or use another -o.") from None
    try:
        yield
    finally:
        # While it is still ours: afterwards the file may be another run's.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _tidy(output: Path, work: Path) -> None:
    """Put right what a run that was killed in its first or last moments left behind."""
    recover(output)
    published = (work / "publishing").exists() and not (work / "artefact").exists()
    if published or not (work / "run.json").exists():
        _discard(work)


def _discard(work: Path) -> None:
    """Remove a work folder; killed half-way, what is left is no interrupted run any more."""
    (work / "run.json").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _execute(
    recipe: Recipe,
    source: ModelSource,
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    work: Path,
    device: str,
    progress: Progress,
) -> Lineage:
    windows = _calibration(recipe, source.folder) if recipe.needs_calibration else None
    _enter(work, _fingerprint(recipe, checkpoint, windows))
    try:
        current, records = checkpoint, []
        for number, (method, options) in enumerate(recipe.steps):
            folder = work / f"{number}-{method.name}"
            folder.mkdir(exist_ok=True)
            run = Run(Draft(current, folder), windows, recipe.seed, folder, device, progress)
            records.append(_step(method, options, current, run))
            current = run.draft
        finished, publishing = work / "artefact", work / "publishing"
        publishing.unlink(missing_ok=True)
        shutil.rmtree(finished, ignore_errors=True)
        progress("writing the model", 0.0)
        files = write_model(current, source.folder, finished, recipe.resolved())
        progress("reloading the model", 0.0)
        check = _reload_check(current, finished, device)
        inherited = read_lineage(source.folder)
        lineage = Lineage(
            name=output.name,
            created=now(),
            parent=Parent(
                id=source.id,
                revision=source.revision,
                sha256=checkpoint.sha256,
                bytes=plan.before.nbytes,
                parameters=plan.before.parameters,
                lineage=inherited and inherited.model_copy(update={"evaluations": []}),
            ),
            dtype=recipe.dtype,
            seed=recipe.seed,
            calibration=windows.describe() if windows is not None else None,
            steps=records,
            result=Result(
                bytes=current.nbytes,
                predicted_bytes=plan.after.nbytes,
                parameters=plan.after.parameters,
                bits_per_parameter=8 * current.nbytes / plan.after.parameters,
                layers=plan.after.num_layers,
                loads_with=plan.after.loads_with,
                files=files,
            ),
            reload=check,
            device=device,
            versions=versions(),
        )
        write_lineage(finished, lineage)
        publishing.touch()  # with this and without the artefact, the run is over
        publish(finished, output)
    except BadInput:
        _discard(work)
        raise
    _discard(work)
    return lineage


def _calibration(recipe: Recipe, folder: Path) -> Windows:
    wanted = recipe.calibration
    return calibration_windows(
        load_tokenizer(folder),
        wanted.source,
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=recipe.seed if wanted.seed is None else wanted.seed,
        chat_template=wanted.chat_template,
    )


def _fingerprint(recipe: Recipe, checkpoint: Checkpoint, windows: Windows | None) -> dict[str, Any]:
    """What must be equal for an interrupted run to be this run."""
    steps = {k: v for k, v in recipe.resolved().items() if k not in ("evaluate", "model", "revision")}
    return {
        "compress-model": compress.__version__,
        "model": checkpoint.sha256,
        "recipe": hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest(),
        "calibration": windows.sha256 if windows is not None else None,
    }


def _enter(work: Path, fingerprint: dict[str, Any]) -> None:
    """Make the work folder, or re-enter that of an interrupted run.

    Raises:
        BadInput: the interrupted run is not this one.
    """
    path = work / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key, value in fingerprint.items() if before.get(key) != value]
        if changed:
            raise BadInput(
                f"'{work}' holds an interrupted run with another {' and '.join(changed)}; "
                "use --fresh to throw it away, or another -o."
            )
        log.info("Going on with the interrupted run in %s.", work)
        return
    _discard(work)
    work.mkdir()
    write_atomically(path, json.dumps(fingerprint))


def _step(method: Method, options: MethodOptions, current: Checkpoint, run: Run) -> Step:
    """Do a step whose draft is equal to its parent, or find it done. The journals of a step that was killed
    half-way bring its draft to where they go on."""
    done = run.folder / "done.json"
    if done.exists():
        run.draft.restore()
        return Step.model_validate_json(done.read_text())
    resumed = any(run.folder.glob("*/progress.json"))
    log.info("%s: %s", method.name, options.model_dump_json())
    reset_peak_memory()
    started = time.perf_counter()
    report = method.apply(StreamedModel(current, run.device, run.progress), options, run)
    run.draft.flush("step")
    record = Step(
        method=method.name,
        family=method.family,
        paper=str(method.paper),
        options=options.model_dump(mode="json"),
        summary=report.summary,
        details=report.details,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory(),
        resumed=resumed,
    )
    write_atomically(done, record.model_dump_json())
    for journal in run.folder.glob("*/"):  # activations can be large, and the next step has its own
        shutil.rmtree(journal)
    log.info("%s: %s (%.0f s)", method.name, report.summary, record.seconds)
    return record


def _check_disk(work: Path, plan: Plan) -> None:
    """Refuse before starting if the disk cannot hold the result and what is written on the way.

    Raises:
        CompressError: there is too little room, counting what an interrupted run takes already.
    """
    wanted = int(ROOM * 2 * plan.after.nbytes) if plan.steps else int(ROOM * plan.after.nbytes)
    taken = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = shutil.disk_usage(work.parent).free + taken
    if free < wanted:
        raise CompressError(
            f"The disk of '{work.parent}' has {free / 1e6:,.0f} MB free, but this run needs about "
            f"{wanted / 1e6:,.0f} MB; free some space or write the result to another disk."
        )


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, windows: Windows, device: str = "cpu") -> torch.Tensor:
    """Logits [N, S, V] (float32) of a causal model, or the first output of another, layer by layer."""
    model = StreamedModel(checkpoint, device)
    stream = model.stream(windows)
    for layer in model.walk(None, stream):
        stream.advance(layer)
    with model.head() as head:
        return torch.cat([first_output(head(hidden)).cpu() for _, hidden, _ in stream.batches()])


def first_output(output: Any) -> torch.Tensor:
    """The logits of a model output, or its first tensor if it has none."""
    return output["logits"] if "logits" in output else output[0]


def _reload_check(current: Checkpoint, folder: Path, device: str) -> ReloadCheck:
    """Compare the logits of the model before it was written with those of the folder, read afresh.

    A plain model that fits into a quarter of the free memory is loaded by transformers itself, as its users
    will; any other one is streamed from its files.
    """
    reloaded = Checkpoint.open(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config_of(current).vocab_size, (2, PROBE_TOKENS // 2), generator=generator)
    probe = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random tokens")
    before = streamed_logits(current, probe, device)
    plain = "quantization_config" not in current.config
    if plain and 4 * sum(info.numel for info in current.tensors.values()) < available_memory() / 4:
        loaded_by = "transformers"
        after = _plain_logits(folder, tokens)
    else:
        loaded_by = "compress-model, layer by layer"
        after = streamed_logits(reloaded, probe, device)
    difference = float((before - after).abs().max())
    if not difference <= PARITY:
        raise CompressError(
            f"The written model does not compute what it did in memory (logits differ by {difference:.3g}); "
            "nothing was published."
        )
    return ReloadCheck(loaded_by=loaded_by, max_difference=difference, tokens=tokens.numel())


@torch.no_grad()
def _plain_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    from compress.anatomy import model_class

    config = transformers.AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    return first_output(model(tokens))
