"""What a run leaves behind: a Hugging Face model folder with its lineage and its card."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

import compress
from compress.engine.weights import PRUNED_FILE, config_of, modeling_source
from compress.errors import BadInput, CompressError
from compress.storage.adapter import write_config
from compress.storage.checkpoint import Checkpoint, write_weights
from compress.system.files import fsync, write_atomically

LINEAGE = "compression.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
VERSIONED = ("torch", "transformers", "safetensors", "compressed-tensors")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parent(_Record):
    """The model a run started from."""

    id: str
    revision: str | None
    sha256: str
    bytes: int
    parameters: int
    lineage: Lineage | None = Field(None, description="its own, without evaluations, if it is an artefact")


class Step(_Record):
    """What one step did, with all its options, and what it took."""

    method: str
    family: str
    paper: str
    options: dict[str, Any]
    summary: str
    details: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None = Field(description="peak resident memory of the process during the step")
    resumed: bool = Field(
        description="the step was interrupted and went on, so seconds and memory cover the last part only"
    )


class Result(_Record):
    """The model that came out: exact file sizes beside what the plan predicted."""

    bytes: int
    predicted_bytes: int
    parameters: int
    bits_per_parameter: float
    layers: int
    loads_with: str
    files: dict[str, str] = Field(description="file name -> sha256")


class ReloadCheck(_Record):
    """Logits of the written files against those of the model before it was written, on a few tokens."""

    loaded_by: Literal["transformers", "compress-model, layer by layer"]
    max_difference: float
    tokens: int


class Lineage(_Record):
    """compression.json."""

    schema_version: Literal[1] = 1
    name: str
    created: AwareDatetime
    parent: Parent
    dtype: str | None
    seed: int
    calibration: dict[str, Any] | None
    steps: list[Step]
    result: Result
    reload: ReloadCheck
    device: str
    versions: dict[str, str]
    evaluations: list[dict[str, Any]] = []

    def chain(self) -> list[Lineage]:
        """All runs from the first model to this one, this one last."""
        return [*(self.parent.lineage.chain() if self.parent.lineage else []), self]


Parent.model_rebuild()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"compress-model": compress.__version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> datetime:
    return datetime.now(UTC)


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of a folder, or None if compress-model did not write it.

    Raises:
        BadInput: compression.json is damaged or of a newer version.
    """
    path = folder / LINEAGE
    if not path.exists():
        return None
    try:
        return Lineage.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{path} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None


def add_evaluations(folder: Path, evaluations: list[dict[str, Any]]) -> None:
    """Append scorecards to the lineage of a folder and write its card again."""
    lineage = read_lineage(folder)
    if lineage is None:
        raise BadInput(f"'{folder}' was not written by compress-model: it has no {LINEAGE}.")
    lineage.evaluations += evaluations
    write_lineage(folder, lineage)


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write compression.json and the card that is drawn from it."""
    card = render_card(lineage, (folder / RECIPE).read_text(encoding="utf-8"))
    write_atomically(folder / LINEAGE, lineage.model_dump_json(indent=2))
    write_atomically(folder / CARD, card)


def write_model(checkpoint: Checkpoint, source: Path, folder: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Write weights, config, recipe, and the tokenizer and generation files of ``source`` into ``folder``.

    Returns:
        File name -> sha256 of everything that decides what the model computes.
    """
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if _is_companion(file):
            shutil.copyfile(file, folder / file.name)
    write_config(checkpoint.config, folder)
    if "pruned" in checkpoint.config:
        (folder / PRUNED_FILE).write_text(modeling_source(config_of(checkpoint)), encoding="utf-8")
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    hashes = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != RECIPE
    }
    return hashes | write_weights(checkpoint, folder)


def _is_companion(file: Path) -> bool:
    """Whether a file of the source model belongs to its copy: tokenizer, templates, generation settings."""
    skipped = {"config.json", LINEAGE, "quantize_config.json", "demo.json"}
    return file.is_file() and (
        (
            file.suffix in (".json", ".model", ".txt", ".jinja")
            and file.name not in skipped
            and not file.name.endswith(".index.json")
        )
        or file.name.upper() in ("LICENSE", "LICENCE", "NOTICE")
    )


def render_card(lineage: Lineage, recipe: str) -> str:
    """The model card (Markdown with the hub's front matter) of a lineage."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from compress.report.compare import compare_newest
    from compress.report.render import to_markdown
    from compress.report.scorecard import Scorecard

    cards = [Scorecard.model_validate_json(json.dumps(card)) for card in lineage.evaluations]
    evaluation = to_markdown(compare_newest(cards)) if cards else None
    environment = Environment(
        loader=PackageLoader("compress.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.jinja").render(
        lineage=lineage, recipe=recipe, evaluation=evaluation
    )


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds anything.

    Raises:
        BadInput: it is not empty, and ``overwrite`` is off or what is in it is no model; or it, or what it
            lies in, is a file.
    """
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not there.is_dir():
        raise BadInput(f"The output '{folder}' cannot be made, because '{there}' is not a folder.")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadInput(f"The output '{folder}' is not a folder.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise BadInput(f"The output folder '{folder}' is not empty; use --overwrite or another -o.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise BadInput(
            f"The output folder '{folder}' holds other things than a model, which --overwrite does not "
            "remove; use another -o."
        )


def publish(work: Path, output: Path) -> None:
    """Let the finished folder ``work`` appear as ``output`` by renaming it. An old ``output`` is replaced.

    Raises:
        CompressError: it cannot be renamed; then an old ``output`` is where it was.
    """
    for path in (*work.iterdir(), work):
        fsync(path)
    old = _old(output)
    try:
        if output.exists():
            output.rename(old)
        work.rename(output)
    except OSError as error:
        recover(output)
        raise CompressError(
            f"The finished model could not be moved to '{output}': {error.strerror}."
        ) from error
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """Bring back or clear away what a `publish` that was killed between its two renames left behind."""
    old = _old(output)
    if not output.exists() and old.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")
