"""Turn the MODEL of the command line (``demo``, a folder or a hub id) into a folder on this machine.

Of a hub model only what `compress.storage.companions` carries over is downloaded, and the weights in
safetensors that the index names. Pickled weights (``.bin``, ``.pt``) and Python code never are, so no code
from the hub is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.errors import BadInput, CompressError


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        id: the name that the user gave (``demo``, a path or a hub id).
        revision: commit of a hub model; None for others.
        folder: where its files are.
    """

    id: str
    revision: str | None
    folder: Path

    @property
    def stored(self) -> Path:
        """What the user has: the .gguf file, whose ``folder`` is in the cache, or else the folder itself.

        The record of a model lies in it, or beside it.
        """
        named = Path(self.id).expanduser()
        return named if is_gguf(named) else self.folder

    def is_inside(self, output: Path) -> bool:
        """Whether an output is the model or holds it, so that replacing the output would remove the model."""
        places = (self.folder, self.stored)
        return any(place.resolve().is_relative_to(output.resolve()) for place in places)


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model on this machine, or download it.

    Args:
        name: ``demo``, the path of a folder or of a .gguf file, or a hub id. What is here takes precedence
            over a hub id.
        revision: branch, tag or commit of a hub model; None takes the main branch.

    Raises:
        BadInput: there is no such folder, and the name is not the id of a hub model that may be read; or a
            revision is given for a model that is not on the hub.
        CompressError: the hub, or the package registry that has the demo model, cannot be reached.
        OSError: the disk is full.
    """
    path = Path(name).expanduser()
    if revision is not None and (name == "demo" or (name and path.exists())):
        raise BadInput(f"'{name}' is not a hub model, so it has no revision '{revision}'.")
    if name == "demo":
        from compress.sources.demo import demo_folder

        return ModelSource("demo", None, demo_folder())
    if name and path.is_dir():  # an empty name would be the current folder
        return ModelSource(name, None, path)
    if is_gguf(path):
        from compress.sources.gguf import gguf_folder

        return ModelSource(name, None, gguf_folder(path))
    if name and path.exists():
        raise BadInput(f"'{name}' is a file; give a folder, a .gguf file, a hub id or 'demo' as MODEL.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.replace("/", "").strip():
        raise BadInput(f"There is no model folder '{name}'.")
    return _download(name, revision, lambda: _fetch(name, revision))


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def find_record(name: str, revision: str | None = None) -> Path | None:
    """Download the record (compression.json) of a hub model, and nothing else.

    Args:
        name: what may be a hub id.
        revision: branch, tag or commit; None takes the main branch.

    Returns:
        The folder that the record is in; None if ``name`` is on this machine, or is the name of a file.

    Raises:
        BadInput, CompressError: as `find_model`.
    """
    from compress.storage.lineage import LINEAGE

    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".json":
        return None
    return _download(name, revision, lambda: _snapshot(name, revision, LINEAGE)).folder


def _snapshot(name: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=[file]))
    if not (folder / file).is_file():
        raise BadInput(f"The hub model '{name}' has no {file}, so no evaluation of it is on record.")
    return folder


def _download(name: str, revision: str | None, fetch: Callable[[], Path]) -> ModelSource:
    """The hub model that ``fetch`` downloads, or why it cannot be downloaded."""
    from compress.system import hub

    try:
        with hub.errors(lambda error: _why(name, revision, error)):
            hub.prepare()
            folder = fetch()
    except PermissionError as error:
        raise CompressError(
            f"'{name}' cannot be downloaded, because the hub's cache '{error.filename}' cannot be written; "
            "set HF_HOME to another folder."
        ) from error
    return ModelSource(name, folder.name, folder)


def _why(name: str, revision: str | None, error: Exception) -> CompressError:
    """The error of a hub model that cannot be downloaded, in one sentence."""
    from huggingface_hub import errors

    from compress.system import hub

    if isinstance(error, errors.GatedRepoError):
        return BadInput(
            f"The hub model '{name}' asks for consent before it is downloaded; give it on the model's page, "
            f"and {hub.LOG_IN}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return BadInput(f"'{name}' is neither a folder here nor a model on the hub that you may read.")
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(f"The hub model '{name}' has no revision '{revision}'.")
    if isinstance(error, errors.HFValidationError):
        return BadInput(f"There is no model folder '{name}', and it is not a hub id.")
    if hub.status_of(error) == 401:
        return BadInput(
            f"'{name}' is not a folder here, and the hub does not accept the access token; {hub.LOG_IN}."
        )
    return CompressError(
        f"'{name}' is not a folder here, and cannot be downloaded, because {hub.trouble(error)}; try "
        "again, check the name, or give the path of a folder."
    )


def _fetch(name: str, revision: str | None) -> Path:
    """Download the settings of a hub model, and then the weights and modules that these name."""
    from huggingface_hub import snapshot_download

    from compress.storage.checkpoint import weight_patterns
    from compress.storage.companions import hub_patterns, module_folders

    wanted, refused = hub_patterns()
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=refused))
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise BadInput(
            f"The hub model '{name}' has no config.json, so it is no model folder; if it holds GGUF files, "
            f"download one with 'hf download {name} FILE.gguf', and give its path."
        )
    weights = [*weight_patterns(folder), *(f"{module}/*" for module in module_folders(folder))]
    kept_out = [pattern for pattern in refused if pattern != "*.safetensors"]
    snapshot_download(name, revision=folder.name, allow_patterns=weights, ignore_patterns=kept_out)
    return folder
