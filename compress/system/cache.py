"""The user's cache: where downloaded corpora, the demo model and built kernels are kept between runs."""

from __future__ import annotations

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
    """The cache folder: ``$COMPRESS_MODEL_CACHE`` where set, else the platform's own. Not created here."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("compress-model")


def cached(name: str, build: Callable[[Path], dict[str, Any]], *, about: str = "about.json") -> Path:
    """The cached folder ``name``, built once.

    ``build(folder)`` fills an empty temporary folder beside it and returns what is to be known of it, which
    is written into it as ``about`` together with every file's length. Only then is it renamed into place, so
    a cached folder is never half of one. A file lock lets two processes ask at once: the second waits and
    finds the first one's work. A folder with a file missing or of another length is thrown away and built
    again; contents are not hashed, for a model that would take seconds each time.

    Raises:
        CompressError: the cache cannot be written, or whatever ``build`` raises (nothing is cached then).
    """
    from filelock import FileLock

    folder = cache_folder() / name
    if _is_whole(folder, about):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not _is_whole(folder, about):
                _build(folder, build, about)
    except OSError as error:
        raise CompressError(
            f"Nothing could be kept in the cache folder {folder.parent} ({error.strerror or error}); "
            f"make room or make it writable, or set {CACHE_VARIABLE} to another folder."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], dict[str, Any]], about: str) -> None:
    # Only the holder of the lock builds, so what earlier, killed builds left behind is nobody's.
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
