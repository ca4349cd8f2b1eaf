"""MODEL on the command line: the demo, a local folder or a hub id, brought to a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.errors import BadInput, CompressError

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        id: what the user called it (``demo``, a path, a hub id).
        revision: commit of a hub model, else None.
        folder: where it is.
    """

    id: str
    revision: str | None
    folder: Path


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Find or download a model.

    Raises:
        BadInput: there is no such folder, and the name cannot be a hub id; or a revision is asked for of what
            is not on the hub.
        CompressError: the hub or the registry cannot be reached, or does not have it.
    """
    path = Path(name).expanduser()
    if revision is not None and (name == "demo" or (name and path.is_dir())):
        raise BadInput(f"'{name}' is no hub model, so it has no revision '{revision}'.")
    if name == "demo":
        from compress.sources.demo import demo_folder

        return ModelSource("demo", None, demo_folder())
    if name and path.is_dir():  # an empty name would be the folder one stands in
        return ModelSource(name, None, path)
    if name and path.exists():
        raise BadInput(f"'{name}' is a file; MODEL is a folder, a hub id or 'demo'.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.replace("/", "").strip():
        raise BadInput(f"There is no model folder '{name}'.")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise BadInput(
            f"'{name}' is neither a folder here nor a model on the hub that you may read."
        ) from None
    except RevisionNotFoundError:
        raise BadInput(f"The hub model '{name}' has no revision '{revision}'.") from None
    except HFValidationError:
        raise BadInput(f"There is no model folder '{name}', and it is not a hub id.") from None
    except (HfHubHTTPError, OSError) as error:
        raise CompressError(
            f"'{name}' is not a folder here, and the hub cannot be reached to download it "
            f"({type(error).__name__}); check the name, or give the path of a folder."
        ) from error
    return ModelSource(name, folder.name, folder)
