"""Exporting a model: check, write, verify with the target's runtime, and publish in one move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress.errors import BadInput, CompressError, DamagedWork
from compress.export.base import Progress, Promise, Target, TargetOptions
from compress.export.model import ExportedModel
from compress.export.verify import NOT_ASKED
from compress.pipeline.artefact import check_output
from compress.pipeline.plan import left_out
from compress.pipeline.workspace import Workspace
from compress.report.card import source_metadata, write_lineage
from compress.sources.find import find_model
from compress.storage.lineage import (
    RECIPE,
    Exported,
    Lineage,
    Parent,
    Result,
    Verification,
    now,
    read_lineage,
    read_recipe,
    record_of,
    versions,
)
from compress.system.files import fsync

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")
"""The endings of files that hold weights."""


def open_for_export(name: str, revision: str | None = None) -> ExportedModel:
    """Find and open the model that is to be exported.

    Args:
        name, revision: as in `find_model`.

    Raises:
        BadInput: as `find_model` and `ExportedModel.open`.
    """
    return ExportedModel.open(find_model(name, revision))


def export(
    model: ExportedModel,
    target: Target[Any],
    options: TargetOptions,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> Lineage:
    """Write a model in the format of ``target``.

    An output that ends like the target's files is one file, with its record ``NAME.compression.json`` beside
    it. Any other output is a folder, with compression.json and a card in it.

    Args:
        model: what to export.
        target, options: the format.
        output: a folder that does not exist, is empty, or may be replaced (``overwrite``); or such a file.
        overwrite: whether to replace what is there.
        verify: whether to load the result with the target's runtime.
        device: where our own reading computes.
        progress: told how far it is.

    Returns:
        The record that was written.

    Raises:
        BadInput: the target cannot hold this model, or the output cannot be written.
        CompressError: the work failed, or the runtime computes something else; nothing is published then.
    """
    workspace = Workspace(output.absolute())
    output = workspace.output
    one_file = bool(target.suffix) and output.suffix == target.suffix
    _check_output(model, output, one_file, overwrite)
    promise = target.check(model, options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with workspace.locked():
        if (workspace.folder / "run.json").exists():
            raise BadInput(
                f"'{workspace.folder}' holds an interrupted run; continue it or throw it away with "
                "'compress-model run', or use another -o."
            )
        workspace.clear_artefact()
        try:
            workspace.check_disk(promise.nbytes)
            lineage = _export(
                model, target, options, promise, workspace, one_file, verify, device, progress, overwrite
            )
        except BaseException as error:
            workspace.clear_artefact()
            useless = isinstance(error, (BadInput, DamagedWork))
            if useless or not any(workspace.folder.glob("*/progress.json")):
                workspace.discard()
            elif isinstance(error, CompressError):
                error.args = (f"{str(error).removesuffix('.')}; the same export goes on where this one was.",)
            raise
        workspace.discard()
        return lineage


def _check_output(model: ExportedModel, output: Path, one_file: bool, overwrite: bool) -> None:
    """Refuse (BadInput) an output that cannot be written, or that holds the model itself."""
    if model.source.is_inside(output):
        raise BadInput(f"The output '{output}' holds the model to export; use another -o.")
    if not one_file:
        check_output(output, overwrite)
    elif output.is_dir():
        raise BadInput(f"The output '{output}' is a folder; name a file, or a folder that ends otherwise.")
    elif output.exists() and not overwrite:
        raise BadInput(f"The output '{output}' exists already; use --overwrite or another -o.")


def _export(
    model: ExportedModel,
    target: Target[Any],
    options: TargetOptions,
    promise: Promise,
    workspace: Workspace,
    one_file: bool,
    verify: bool,
    device: str,
    progress: Progress,
    overwrite: bool,
) -> Lineage:
    output, folder = workspace.output, workspace.artefact
    workspace.folder.mkdir(exist_ok=True)
    recipe = _recipe(model)
    if target.suffix:
        folder.mkdir()
        path = folder / (output.name if one_file else f"{output.name}{target.suffix}")
    else:
        path = folder
    files = target.write(model, path, options, recipe, progress)
    if verify:
        progress("checking it", 0.0)
        found = target.verify(model, path, options, device)
    else:
        found = Verification(runtime=target.runtime, not_tried=NOT_ASKED)
    lineage = _lineage(model, target, options, promise, files, folder, found, output.name, device)
    if not one_file:
        (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
        write_lineage(folder, lineage)
        check_output(output, overwrite)
        workspace.publish()
        return lineage
    write_lineage(path, lineage)
    record = record_of(path)
    for file in (record, path):  # both are whole on the disk before one is published
        fsync(file)
    there = output.with_name(record.name)
    there.unlink(missing_ok=True)  # a file without a record is better than one with that of another file
    path.replace(output)
    record.replace(there)
    fsync(output.parent)
    return lineage


def _recipe(model: ExportedModel) -> dict[str, Any]:
    """The recipe that the model was made by; that of a model without one only names it."""
    return read_recipe(model.source.folder) or {"model": model.source.id, "steps": []}


def _lineage(
    model: ExportedModel,
    target: Target[Any],
    options: TargetOptions,
    promise: Promise,
    files: dict[str, str],
    folder: Path,
    found: Verification,
    name: str,
    device: str,
) -> Lineage:
    shape, inherited = model.shape, read_lineage(model.source.stored)
    nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)
    if not nbytes:
        raise CompressError(f"The target {target.name} wrote no weights, which is an error of this program.")
    return Lineage(
        name=name,
        created=now(),
        parent=Parent(
            id=model.source.id,
            revision=model.source.revision,
            sha256=model.checkpoint.sha256,
            bytes=shape.nbytes,
            parameters=shape.parameters,
            lineage=inherited and inherited.model_copy(update={"evaluations": [], "audits": []}),
        ),
        dtype=None,
        seed=0,
        calibration=target.calibration,
        steps=[],
        result=Result(
            bytes=nbytes,
            predicted_bytes=promise.nbytes,
            parameters=shape.parameters,
            bits_per_parameter=8 * nbytes / shape.parameters,
            layers=shape.num_layers,
            loads_with=promise.loads_with,
            files=files,
        ),
        reload=None,
        exported=Exported(
            target=target.name,
            options=options.model_dump(mode="json"),
            notes=[*promise.notes, *target.notes()],
            verification=found,
        ),
        left_out=left_out(model.source, model.checkpoint),
        card=source_metadata(model.source.folder),
        device=device,
        versions=versions(),
    )
