"""The user's cache, which keeps downloaded corpora, the demo model and built kernels between runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from compress.errors import CompressError

CACHE_VARIABLE = "COMPRESS_MODEL_CACHE"


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: ``$COMPRESS_MODEL_CACHE``, or else that of the platform."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("compress-model")


def cached(name: str, build: Callable[[Path], dict[str, Any]], *, about: str = "about.json") -> Path:
    """The folder ``name`` of the cache, which is built when it is first needed.

    ``build`` fills an empty temporary folder and returns metadata, which is written into the folder together
    with the lengths of all files. Only then is the folder renamed to its place, so a cached folder is always
    complete. If two processes need the same folder, a file lock makes the second wait for the first. A folder
    in which a file is missing or has another length is built anew. Contents are not hashed, because that
    would take seconds for a model.

    Args:
        name: of the folder; it may lie in another, as in ``kernels/avx2``.
        build: fills the folder it is given and returns metadata.
        about: name of the file of metadata.

    Raises:
        CompressError: the cache cannot be written. Errors of ``build`` are passed on. Nothing is cached then.
    """
    from filelock import FileLock

    folder = cache_folder() / name
    if _is_whole(folder, about):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not _is_whole(folder, about):
                _build(folder, build, about)
    except OSError as error:
        raise not_written(folder.parent, error) from error
    return folder


def make_folder(folder: Path) -> None:
    """Create ``folder`` in the cache, or see that it can be written, before the work whose results go there.

    Raises:
        CompressError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise not_written(folder, error) from error


def not_written(folder: Path, error: OSError) -> CompressError:
    """The error for a folder of the cache that cannot be written."""
    return CompressError(
        f"The cache folder {folder} cannot be written ({error.strerror or error}); free some space, make it "
        f"writable, or set {CACHE_VARIABLE} to another folder."
    )


def _build(folder: Path, build: Callable[[Path], dict[str, Any]], about: str) -> None:
    # Only the holder of the lock builds, so whatever is there was left behind by builds that were killed.
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        facts = build(fresh)
        lengths = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        text = json.dumps(facts | {"files": lengths}, indent=2) + "\n"
        (fresh / about).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "damaged")
        fresh.rename(folder)


def _is_whole(folder: Path, about: str) -> bool:
    try:
        lengths = json.loads((folder / about).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == length for name, length in lengths.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
