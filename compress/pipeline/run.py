"""Executing a recipe: plan, then step after step, then one artefact, checked by reloading it.

All work happens in a hidden folder beside the output, which the finished artefact leaves by a rename. A
killed run leaves only that folder behind, and the same command continues from the last finished layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import compress
from compress.calibration.text.prepare import prepare_calibration
from compress.calibration.text.records import read_records
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import Method, MethodOptions, StepContext
from compress.pipeline.acting import Acting, inherited_acting, measured_again, plain
from compress.pipeline.artefact import check_output, write_model
from compress.pipeline.mixing import mix_bits
from compress.pipeline.plan import Plan, left_out, make_plan, open_model
from compress.pipeline.recipe import Recipe
from compress.pipeline.reload import reload_check
from compress.pipeline.workspace import Workspace
from compress.report.card import source_metadata, write_lineage
from compress.sources.find import ModelSource
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.lineage import Lineage, Parent, Result, Step, now, read_lineage, versions
from compress.system.device import (
    check_device,
    computing_on,
    peak_device_memory,
    reset_peak_device_memory,
)
from compress.system.files import write_atomically
from compress.system.memory import peak_memory, reset_peak_memory
from compress.system.progress import Forecast, Progress

log = logging.getLogger(__name__)

LESS_TEXT = "; fewer or shorter calibration windows (nsamples, seqlen) take less"

Keep = Callable[[Checkpoint, Path, dict[str, Any], str, list[Step]], None]
"""Keeps a model. It is given the model, the folder of the recipe's model, the resolved recipe, the hash of
the recipe's model, and the records of the steps that were done."""

DONE = "done.json"
"""The record of a finished step, in its folder."""


def execute(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
    keep: Keep | None = None,
    try_loaders: bool = True,
    unseen: Set[str] = frozenset(),
) -> Lineage:
    """Run a recipe and write its artefact to ``output``.

    Args:
        recipe: what to do.
        output: a folder that does not exist, is empty, or may be replaced (``overwrite``).
        resume: True goes on with an interrupted run, False throws it away, None goes on if it is the same
            run and refuses otherwise.
        device: where to compute.
        progress: told a text and the share of the current part that is done.
        keep: given the model as it is behind its last step of unlearning, if other steps follow.
        try_loaders: whether the programs that the model is promised to load with are tried on it.
        unseen: hashes of documents that the model will be evaluated on, so it must not be calibrated on them.

    Raises:
        BadInput: the recipe does not fit the model, the text, the device or the output folder.
        CompressError: the work failed: no disk space, broken activations, or a reload that does not match.
    """
    workspace = Workspace(output.absolute())
    output = workspace.output
    if output.parent.is_dir():
        with workspace.locked():
            workspace.tidy()
    check_output(output, overwrite)
    check_device(device)
    source, checkpoint = open_model(recipe)
    if source.is_inside(output):
        raise BadInput(f"The output '{output}' holds the model to compress; use another -o.")
    plan = make_plan(checkpoint, recipe.steps)
    if plan.warning:
        log.warning("%s", plan.warning)
    output.parent.mkdir(parents=True, exist_ok=True)
    with workspace.locked():
        check_output(output, overwrite)  # again: another run may have finished meanwhile
        if resume is False:
            workspace.discard()
        # Steps write what they change, beside what is put together from it in the end.
        workspace.check_disk(plan.after.nbytes * (2 if recipe.steps else 1))
        with computing_on(device):
            return _execute(
                *(recipe, source, checkpoint, plan, workspace, device, progress, keep, try_loaders, unseen)
            )


def _execute(
    recipe: Recipe,
    source: ModelSource,
    checkpoint: Checkpoint,
    plan: Plan,
    workspace: Workspace,
    device: str,
    progress: Progress,
    keep: Keep | None,
    try_loaders: bool,
    unseen: Set[str],
) -> Lineage:
    forget = [read_records(source) for source in recipe.forgotten]
    windows = (
        prepare_calibration(
            recipe.calibration, recipe.seed, checkpoint, device, progress, recipe.text_size, forget
        )
        if recipe.needs_calibration
        else None
    )
    if windows is not None and (common := windows.document_hashes & unseen):
        raise BadInput(
            f"The recipe calibrates on {len(common)} of the documents that it evaluates the result on; take "
            "another text for one of the two."
        )
    workspace.enter(_fingerprint(recipe, checkpoint, windows))
    try:
        current, records = _carry_out(recipe, source, checkpoint, windows, workspace, device, progress, keep)
        workspace.clear_artefact()
        progress("writing the model", 0.0)
        files = write_model(current, source.folder, workspace.artefact, recipe.resolved(windows))
        progress("reloading the model", 0.0)
        check = reload_check(current, workspace.artefact, device, try_loaders)
        inherited = read_lineage(source.stored)
        shape = ModelShape.of(current)  # which may differ from the plan where a method decides widths by data
        lineage = Lineage(
            name=workspace.output.name,
            created=now(),
            parent=Parent(
                id=source.id,
                revision=source.revision,
                sha256=checkpoint.as_stored.sha256,
                bytes=plan.before.nbytes,
                parameters=plan.before.parameters,
                lineage=inherited and inherited.model_copy(update={"evaluations": [], "audits": []}),
            ),
            dtype=recipe.dtype,
            seed=recipe.seed,
            calibration=windows.describe() if windows is not None else None,
            steps=records,
            result=Result(
                bytes=shape.nbytes,
                predicted_bytes=plan.after.nbytes,
                parameters=shape.parameters,
                bits_per_parameter=8 * shape.nbytes / shape.parameters,
                layers=shape.num_layers,
                loads_with=str(shape.loads_with),
                files=files,
            ),
            reload=check,
            left_out=left_out(source, checkpoint),
            card=source_metadata(source.folder),
            device=device,
            versions=versions(),
        )
        write_lineage(workspace.artefact, lineage)
        workspace.publish()
    except CompressError as error:
        _keep_finished(workspace, recipe, error)
        raise
    return lineage


def _carry_out(
    recipe: Recipe,
    source: ModelSource,
    checkpoint: Checkpoint,
    windows: Windows | None,
    workspace: Workspace,
    device: str,
    progress: Progress,
    keep: Keep | None,
) -> tuple[Checkpoint, list[Step]]:
    """Do all steps: the resulting model, and the record of each step.

    Methods that act at inference, of the recipe or of the model it starts from, measure again at the end.
    """
    records: list[Step] = []
    current, acting = checkpoint, []
    if recipe.steps or recipe.dtype:
        acting = inherited_acting(checkpoint)
        current = plain(checkpoint)

    def context_in(name: str, current: Checkpoint) -> StepContext:
        folder = workspace.folder / name
        folder.mkdir(exist_ok=True)
        forecast = Forecast(progress, LESS_TEXT if windows is not None else "")
        return StepContext(Draft(current, folder), windows, recipe.seed, folder, device, forecast)

    def with_acting(finished: int) -> tuple[Checkpoint, list[Step]]:
        """The model after so many steps, with all that acts measured on it, and the records of that."""
        if [one.number for one in acting] == [finished - 1]:  # nothing came after it
            return acting[0].before, records
        result, found = current, list(records)
        for place, one in enumerate(acting):
            # `Workspace.enter` counts the folders of steps that were begun, by their names; this is none.
            context = context_in(f"again-{place}-after-{finished}-of-{len(recipe.steps)}", result)
            again = _step(one.method, one.options, result, context, one.before)
            result = context.draft
            if one.number is None:
                found.append(again)
            else:
                found[one.number] = measured_again(records[one.number], again)
        return result, found

    for number, (method, options) in enumerate(recipe.steps):
        context = context_in(_folder(workspace, number, method).name, current)
        records.append(_step(method, options, current, context))
        if method.at_inference:
            acting.append(Acting(method, options, context.draft, number))
        else:
            current = context.draft
        if keep is not None and number + 1 == recipe.unlearning < len(recipe.steps):
            unlearned, done = with_acting(number + 1)
            keep(unlearned, source.folder, recipe.resolved(windows), checkpoint.as_stored.sha256, done)
    return with_acting(len(recipe.steps))


def _keep_finished(workspace: Workspace, recipe: Recipe, error: CompressError) -> None:
    """Keep the finished steps of a run that failed, and say so in the error; without any, bad input leaves
    nothing behind."""
    folders = [_folder(workspace, number, method) for number, (method, _) in enumerate(recipe.steps)]
    finished = [folder for folder in folders if (folder / DONE).exists()]
    if isinstance(error, BadInput) and not finished:
        workspace.discard()
    elif isinstance(error, BadInput):  # the next run may have other options for the steps that failed
        workspace.clear_artefact()
        for folder in folders[len(finished) :]:
            shutil.rmtree(folder, ignore_errors=True)
    if finished:
        names = " and ".join(folder.name.partition("-")[2] for folder in finished)
        said = str(error).removesuffix(".")
        error.args = (f"{said}; {names} is done and kept for the next run with this -o.",)


def _folder(workspace: Workspace, number: int, method: Method) -> Path:
    """Where a step works, and what it leaves for the next one."""
    return workspace.folder / f"{number}-{method.name}"


def _fingerprint(recipe: Recipe, checkpoint: Checkpoint, windows: Windows | None) -> dict[str, Any]:
    """What must be the same for an interrupted run to be continued (of the steps: those that were begun)."""
    resolved = recipe.resolved()
    rest = {k: v for k, v in resolved.items() if k not in ("audit", "evaluate", "model", "revision", "steps")}
    return {
        "compress-model": compress.__version__,
        "model": checkpoint.as_stored.sha256,
        "recipe": _hash(rest),
        "calibration": windows.sha256 if windows is not None else None,
        "steps": [_hash(step) for step in resolved["steps"]],
        # Steps of unlearning come first, and no others read records.
        "records": [_hash(options.content()) for _, options in recipe.steps[: recipe.unlearning]],
    }


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()  # patterns have an order


def _step(
    method: Method,
    options: MethodOptions,
    current: Checkpoint,
    context: StepContext,
    before: Checkpoint | None = None,
) -> Step:
    """Do a step, or find that it is done; with ``before``, refresh it.

    The draft starts equal to its parent. If the step was killed half-way, its journals restore the draft.
    """
    done = context.folder / DONE
    if done.exists():
        context.draft.restore()
        return Step.model_validate_json(done.read_text())
    # A walk's journal, or the state that a Trainer saved.
    resumed = any(any(context.folder.glob(saved)) for saved in ("*/progress.json", "*/checkpoint-*"))
    log.info("%s: %s", method.name, options.model_dump_json())
    reset_peak_memory()
    reset_peak_device_memory(context.device)
    started = time.perf_counter()
    options = mix_bits(method, options, current, context)
    model = StreamedModel(current, context.device, context.progress)
    if before is None:
        report = method.apply(model, options, context)
    else:
        report = method.refresh(model, options, context, before)
    context.draft.flush("step")
    record = Step(
        method=method.name,
        family=method.family,
        paper=str(method.paper),
        options=options.model_dump(mode="json"),
        summary=report.summary,
        details=report.details,
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(context.device),
        resumed=resumed,
    )
    write_atomically(done, record.model_dump_json())
    for journal in context.folder.glob("*/"):  # activations can be large, and the next step has its own
        shutil.rmtree(journal)
    log.info("%s: %s (%.0f s)", method.name, report.summary, record.seconds)
    return record
