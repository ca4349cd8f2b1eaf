"""Compiles the native sources for a path, once for each user: the result stays in the cache.

Without a compiler this fails; `compress.kernels.cpu.library` says so and goes on in plain torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.kernels.cpu.processor import PATHS
from compress.system.cache import cache_folder, cached, make_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
"""The folder of the native sources."""

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after ``$CXX``."""

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC")
FOLDER = "kernels"
LIBRARY = "kernels.so"
SCRATCH = "compress-kernels-"


class NotBuilt(CompressError):
    """The kernels of a path cannot be compiled here. The message is a clause that says why."""


@contextmanager
def built(path: str) -> Iterator[Path]:
    """The library file of a path, compiled on first use. It may be gone after the ``with`` block.

    Two processes that need it at once compile it once, and a compilation that was killed leaves nothing that
    could be taken for a library (see `compress.system.cache.cached`). If the cache cannot be written, or
    others can write to it, the file lies in a temporary folder. Without a compiler, one that was compiled
    before by any compiler is taken.

    Args:
        path: one of `PATHS`.

    Raises:
        NotBuilt: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    if file := _cached(path, compiler) if compiler else _left_behind(path):
        yield file
    elif compiler:
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            yield _compiled(path, compiler, Path(scratch))
    else:
        raise NotBuilt(f"there is no C++ compiler (looked for $CXX, {', '.join(COMPILERS)})")


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler as the first words of its command line, or None. ``$CXX`` is taken at its word."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return tuple(chosen)
    return next(((found,) for name in COMPILERS if (found := shutil.which(name))), None)


def compiler_version() -> str | None:
    """The C++ compiler and what it says about itself; None if there is none that runs."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return f"{' '.join(compiler)}: {_version(compiler)}"
    except NotBuilt:
        return None


def _cached(path: str, compiler: tuple[str, ...]) -> Path | None:
    """The file in the cache, compiled if it is not there yet; None if it cannot be there."""

    def build(folder: Path) -> dict[str, Any]:
        log.info("Compiling the CPU kernels (%s), once.", path)
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            shutil.copyfile(_compiled(path, compiler, Path(scratch)), folder / LIBRARY)
        return {"compiler": _version(compiler), "flags": _flags(path)}

    name = f"{path}-{_key(path)}-{digest(compiler, _version(compiler))}"
    try:
        make_private(cache_folder() / FOLDER)
        return cached(f"{FOLDER}/{name}", build) / LIBRARY
    except NotBuilt:
        raise
    except CompressError as error:
        warn_once(f"{error} Until then, every process compiles the CPU kernels anew.")
        return None


@cache
def warn_once(sentence: str) -> None:
    log.warning("%s", sentence)  # each once


def _left_behind(path: str) -> Path | None:
    """A file of these sources in the cache, whichever compiler made it."""
    folder = cache_folder() / FOLDER
    found = sorted(folder.glob(f"{path}-{_key(path)}-*/{LIBRARY}"))
    if found:
        _check_private(folder)
    return next(iter(found), None)


def make_private(folder: Path) -> None:
    """Make a folder of the cache, or see that only its owner can write to it.

    Raises:
        CompressError: it cannot be made, or others can write to it.
    """
    if not folder.exists():
        make_folder(folder)
        folder.chmod(0o700)
    _check_private(folder)


def _check_private(folder: Path) -> None:
    # What lies here is executed, so nobody else may be able to put it here.
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompressError(
            f"Other users can write to the folder {folder}; remove it, or run 'chmod go-w' on it."
        )


def _key(path: str) -> str:
    return digest(_flags(path), *((file.name, file.read_bytes()) for file in sorted(SOURCE.iterdir())))


def digest(*parts: object) -> str:
    """Twelve digits that differ where the parts do."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _flags(path: str) -> tuple[str, ...]:
    return (*FLAGS, *PATHS[path].flags)


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return run([*compiler, "--version"]).partition("\n")[0]


def _compiled(path: str, compiler: tuple[str, ...], folder: Path) -> Path:
    """Compiles all sources at the same time, and links them."""
    sources = sorted(SOURCE.glob("*.cpp"), key=lambda file: -file.stat().st_size)

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        run([*compiler, *_flags(path), "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run([*compiler, *_flags(path), "-shared", *objects, "-o", str(folder / LIBRARY)])
    return folder / LIBRARY


def run(command: list[str]) -> str:
    """What a compiler writes to its output.

    Raises:
        NotBuilt: it cannot be run, or fails.
    """
    environment = os.environ | {"LC_ALL": "C"}
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise NotBuilt(f"{command[0]} cannot be run: {error.strerror}") from error
    if ended.returncode < 0:
        raise NotBuilt(f"{command[0]} was killed by signal {-ended.returncode}")
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise NotBuilt(f"{command[0]} says: {next((line for line in lines if 'error' in line), lines[-1])}")
    return ended.stdout
