"""The user's cache: where downloaded corpora, the demo model and built kernels are kept between runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from compress.errors import CompressError

CACHE_VARIABLE = "COMPRESS_MODEL_CACHE"


def cache_folder() -> Path:
    """The cache folder: ``$COMPRESS_MODEL_CACHE`` where set, else the platform's own. Not created here."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("compress-model")


def cached(name: str, build: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """The cached folder ``name``, built once.

    ``build(folder)`` fills an empty temporary folder beside it, which is renamed into place only when
    ``build`` returns, so a cached folder is never half of one. A file lock lets two processes ask at once:
    the second waits and finds the first one's work. ``is_whole(folder)`` is a cheap check on what is
    already there; a folder that fails it is thrown away and built again.

    Raises:
        CompressError: the cache cannot be written, or whatever ``build`` raises (nothing is cached then).
    """
    from filelock import FileLock

    folder = cache_folder() / name
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not is_whole(folder):
                _build(folder, build)
    except OSError as error:
        raise CompressError(
            f"Nothing could be kept in the cache folder {folder.parent} ({error.strerror or error}); "
            f"make room or make it writable, or set {CACHE_VARIABLE} to another folder."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    # Only the holder of the lock builds, so what earlier, killed builds left behind is nobody's.
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        build(fresh)
        if folder.exists():
            folder.rename(Path(scratch) / "damaged")
        fresh.rename(folder)
