"""compression.json: where a model comes from, what was done to it, and what the result is."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

import compress
from compress.errors import BadInput

LINEAGE = "compression.json"
RECIPE = "recipe.yaml"
VERSIONED = ("torch", "transformers", "safetensors", "compressed-tensors")
"""The packages whose versions are recorded."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parent(_Record):
    """The model a run started from."""

    id: str
    revision: str | None
    sha256: str
    bytes: int
    parameters: int
    lineage: Lineage | None = Field(
        None, description="its own lineage without evaluations, if it is an artefact"
    )


class Step(_Record):
    """What one step did, with all its options, and what time and memory it took."""

    method: str
    family: str
    paper: str
    options: dict[str, Any]
    summary: str
    details: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None = Field(description="peak resident memory of the process during the step")
    peak_device_memory_bytes: int | None = Field(
        None, description="most memory that tensors took on the device during the step; none on a CPU"
    )
    resumed: bool = Field(
        description="the step was interrupted and resumed, so seconds and memory cover the last part only"
    )

    @property
    def content(self) -> dict[str, str]:
        """The sha256 of the sets of records and of the anchors that the step read, from its details."""
        found = {name: part for name, part in self.details.items() if isinstance(part, dict)}
        return {name: part["sha256"] for name, part in found.items() if "sha256" in part}


class Result(_Record):
    """The resulting model. ``bytes`` is the exact size of the files, ``predicted_bytes`` that of the plan."""

    bytes: int
    predicted_bytes: int
    parameters: int
    bits_per_parameter: float
    layers: int
    loads_with: str = Field(description="the programs that can load the model")
    files: dict[str, str] = Field(description="file name -> sha256")


class LoaderTrial(_Record):
    """Whether the programs that a model is promised to load with were tried on it, and what came out.

    ``str()`` gives it as a sentence without a full stop.
    """

    loader: str = Field(description="the programs with their versions")
    difference: float | None = Field(
        None, description="root mean square difference of the logits, as a share of their standard deviation"
    )
    not_tried: str | None = Field(None, description="the reason, if they were not tried here")

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.loader}: not tried here, because {self.not_tried}"
        return f"{self.loader}: tried, logits differ by {self.difference:.1g} of their spread"


class ReloadCheck(_Record):
    """The logits of the written files, compared with those of the model in memory, on a few tokens."""

    loaded_by: Literal["transformers", "compress-model", "compress-model, layer by layer"]
    max_difference: float
    tokens: int
    promised: LoaderTrial | None = Field(
        None, description="the programs that the model loads with; None in files of older versions"
    )


class Verification(_Record):
    """What the program that an export is for computed with it, held against the model that was exported.

    ``str()`` gives it as a sentence without a full stop.
    """

    runtime: str = Field(description="the programs that load the export, with their versions")
    kl: float | None = Field(None, description="mean KL divergence from the exported model, nats per token")
    agreement: float | None = Field(None, description="share of tokens with the same likeliest next token")
    difference: float | None = Field(
        None, description="root mean square difference of the logits, as a share of their standard deviation"
    )
    tokens: int = Field(0, description="random tokens that were compared; on text models differ less")
    not_tried: str | None = Field(
        None,
        description="the reason, if they were not tried here; the figures are of our own reading then",
    )

    def __str__(self) -> str:
        parts = []
        if self.kl is not None:
            parts.append(f"KL divergence {self.kl:.1g}")
        if self.agreement is not None:
            parts.append(f"{self.agreement:.0%} of next tokens the same")
        if not parts and self.difference is not None:
            parts.append(f"outputs differ by {self.difference:.1g} of their spread")
        figures = f"{', '.join(parts)} over {self.tokens} random tokens" if parts else ""
        if self.not_tried is None:
            return f"Verified with {self.runtime}: {figures}"
        own = f"; read back by compress-model: {figures}" if figures else ""
        return f"Not verified with {self.runtime}, because {self.not_tried}{own}"


class Exported(_Record):
    """The format that a model was exported to, and whether its runtime was tried."""

    target: str
    options: dict[str, Any]
    notes: list[str] = Field(description="what differs from the model that was exported, in sentences")
    verification: Verification


class Lineage(_Record):
    """The content of compression.json."""

    schema_version: Literal[1] = 1
    name: str
    created: AwareDatetime
    parent: Parent
    dtype: str | None
    seed: int
    calibration: dict[str, Any] | None
    steps: list[Step]
    result: Result
    reload: ReloadCheck | None = Field(description="of what a run wrote; None of an export")
    exported: Exported | None = Field(None, description="the format, if this is an export")
    left_out: list[str] = Field([], description="what the source holds and the result does not, in sentences")
    card: dict[str, Any] = Field({}, description="metadata of the source's card that holds for the result")
    device: str
    versions: dict[str, str]
    evaluations: list[dict[str, Any]] = []
    audits: list[dict[str, Any]] = Field([], description="audits of forgetting, the newest last")

    def chain(self) -> list[Lineage]:
        """All runs from the first model to this one, which comes last."""
        return [*(self.parent.lineage.chain() if self.parent.lineage else []), self]


Parent.model_rebuild()


def versions() -> dict[str, str]:
    """Versions of the software that the results depend on."""
    found = {"compress-model": compress.__version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> datetime:
    return datetime.now(UTC)


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The resolved recipe in a folder that compress-model wrote, or None if there is none.

    Other tools write a recipe.yaml of their own, such as llm-compressor.

    Raises:
        BadInput: it is damaged.
    """
    path = folder / RECIPE
    if not (path.is_file() and record_of(folder).is_file()):
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if all(isinstance(step["method"], str) for step in found["steps"]):
            return dict(found)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        pass
    raise BadInput(f"{path} is damaged; move it away to use the model without it.")


def record_of(model: Path) -> Path:
    """The file that holds the lineage of a model: in its folder, or beside its one file."""
    return model.with_name(f"{model.name}.{LINEAGE}") if model.is_file() else model / LINEAGE


def read_lineage(model: Path) -> Lineage | None:
    """The lineage of a model, or None if compress-model did not write it.

    Args:
        model: its folder, or the one file that it is.

    Raises:
        BadInput: the record is damaged, a newer version wrote it, or it is of a file of another size.
    """
    path = record_of(model)
    if not path.exists():
        return None
    try:
        lineage = Lineage.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise BadInput(f"{path} cannot be read: {where}{first['msg']}.") from None
    if model.is_file() and model.stat().st_size != lineage.result.bytes:
        raise of_another_file(model)
    return lineage


def of_another_file(model: Path) -> BadInput:
    """The error for a file of weights that was changed or replaced since its record was written."""
    return BadInput(
        f"The record '{record_of(model)}' is of another file than '{model.name}' is now; move it away to use "
        "the file without it."
    )
