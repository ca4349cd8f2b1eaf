"""What a target is: a format that a model can be exported to, and the program that loads it."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import compress
from compress.engine.journal import Journal
from compress.engine.shape import ModelShape
from compress.export.converted import Converted
from compress.export.model import ExportedModel
from compress.export.verify import verify_folder
from compress.pipeline.artefact import write_model
from compress.storage.lineage import Verification
from compress.system.files import write_atomically
from compress.system.settings import Settings

Progress = Callable[[str, float], None]
"""Told a text and the share of the current part that is done."""


class TargetOptions(Settings):
    """The options of a target. Each becomes an option of ``compress-model export``."""


Chosen = TypeVar("Chosen", bound=TargetOptions)
"""The options of a target, as they were chosen."""


@dataclass(frozen=True)
class Promise:
    """What an export will be, known from configs and headers alone.

    Attributes:
        nbytes: of the weights on disk.
        loads_with: the programs that can load it, as a sentence.
        notes: what differs from the model that is exported, in sentences; empty if nothing does.
    """

    nbytes: int
    loads_with: str
    notes: tuple[str, ...] = ()


class Target(ABC, Generic[Chosen]):
    """A format of another program.

    One instance exports one model: `check` first, then `write`, then `verify`.
    """

    name: ClassVar[str]
    """What users call it."""

    summary: ClassVar[str]
    """What it is, in one line."""

    runtime: ClassVar[str]
    """The programs that load it."""

    suffix: ClassVar[str] = ""
    """The ending of the file that holds the whole export, such as ``.gguf``; empty for a folder."""

    holds: ClassVar[str] = "weights"
    """What its bytes are counted of."""

    Options: type[TargetOptions] = TargetOptions

    calibration: dict[str, Any] | None = None
    """The text that `write` has read, as a lineage describes it; None if it needs none."""

    @abstractmethod
    def check(self, model: ExportedModel, options: Chosen) -> Promise:
        """Find out, from configs and headers alone, what the export will be.

        Raises:
            BadInput: the target cannot hold this model. The sentence says why, and the nearest thing that
                works.
        """

    @abstractmethod
    def write(
        self, model: ExportedModel, path: Path, options: Chosen, recipe: dict[str, Any], progress: Progress
    ) -> dict[str, str]:
        """Write the export.

        Args:
            model: has passed `check`.
            path: a folder that does not exist yet, or a file with the `suffix`.
            options: the same as given to `check`.
            recipe: what is known of how the model was made, for a folder's recipe.yaml.
            progress: told how far it is.

        Returns:
            File name inside the export -> sha256, for every file that decides what the model computes.

        Raises:
            BadInput: the weights themselves do not fit the target. The sentence is as in `check`.
        """

    @abstractmethod
    def verify(self, model: ExportedModel, path: Path, options: Chosen, device: str) -> Verification:
        """Load what was written with the target's own runtime and compare what it computes.

        Returns:
            What came out, or why the runtime could not be tried here.

        Raises:
            CompressError: the runtime fails on it, or computes something else.
        """

    def notes(self) -> tuple[str, ...]:
        """What `write` found that differs from the model and `check` could not know, in sentences."""
        return ()


def journal_beside(path: Path, model: ExportedModel, **work: Any) -> Journal:
    """The journal of long work for an export: that of an interrupted export if it did the same work.

    Args:
        path: as given to `Target.write`. The journal's folder lies beside the one that becomes the export.
        model: what is exported.
        work: all else that the results depend on; JSON values.
    """
    folder = path.parent.parent / "work"
    begun, wanted = folder / "begun.json", {"compress-model": compress.__version__, **work}
    wanted["model"] = model.checkpoint.sha256
    if not begun.exists() or json.loads(begun.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_atomically(begun, json.dumps(wanted))
    return Journal(folder)


class FolderTarget(Target[Chosen]):
    """A target that is a Hugging Face model folder. A subclass says what is in it."""

    @abstractmethod
    def converted(self, model: ExportedModel, options: Chosen) -> tuple[Converted, tuple[str, ...]]:
        """The model in this format, of which nothing is read yet, and what differs from it in sentences.

        Raises:
            BadInput: as `check`.
        """

    def check(self, model: ExportedModel, options: Chosen) -> Promise:
        found, notes = self.converted(model, options)
        return Promise(found.file_bytes, self.loads_with(found), notes)

    def loads_with(self, found: Converted) -> str:
        """The programs that can load the export, as a sentence."""
        return str(ModelShape.of(found).loads_with)

    def write(
        self, model: ExportedModel, path: Path, options: Chosen, recipe: dict[str, Any], progress: Progress
    ) -> dict[str, str]:
        progress("writing the model", 0.0)
        found, _ = self.converted(model, options)
        return write_model(found, model.source.folder, path, recipe)

    def verify(self, model: ExportedModel, path: Path, options: Chosen, device: str) -> Verification:
        return verify_folder(model, path, device)
