"""Native sources become one library: compiled once for each user and kept in the cache.

`compress.kernels.cpu.build` says what is compiled for the CPU, and `compress.kernels.cuda.build` for GPUs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.system.cache import cache_folder, cached, make_folder

log = logging.getLogger(__name__)

FOLDER = "kernels"
LIBRARY = "kernels.so"
SCRATCH = "compress-kernels-"

OFF, ABLE, NAMED = range(3)
"""A backend is not used, used where it can be, or asked for by name."""


class NotBuilt(CompressError):
    """Kernels cannot be compiled here. The message is a clause that says why."""


@dataclass(frozen=True)
class NativeLibrary:
    """Sources and how they become a library.

    Attributes:
        what: the kernels in words, for sentences: ``CPU kernels``.
        variant: what they are compiled for, in words and in the names of files.
        folder: of the sources and their headers.
        pattern: of the names of the sources.
        compiler: the first words of its command line; empty if there is none.
        flags: for compiling and linking.
        link: further words for linking.
        missing: the clause that says that there is no compiler.
    """

    what: str
    variant: str
    folder: Path
    pattern: str
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]
    missing: str

    @contextmanager
    def built(self) -> Iterator[Path]:
        """The library file, compiled on first use. It may be gone after the ``with`` block.

        Two processes that need it at once compile it once, and a compilation that was killed leaves nothing
        that could be taken for a library (see `compress.system.cache.cached`). If the cache cannot be
        written, or others can write to it, the file lies in a temporary folder. Without a compiler, one that
        was compiled before by any compiler is taken.

        Raises:
            NotBuilt: there is no compiler, or it fails.
        """
        if file := self._cached() if self.compiler else self._left_behind():
            yield file
        elif self.compiler:
            with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
                yield self._compiled(Path(scratch))
        else:
            raise NotBuilt(self.missing)

    def _cached(self) -> Path | None:
        """The file in the cache, compiled if it is not there yet; None if it cannot be there."""

        def build(folder: Path) -> dict[str, Any]:
            log.info("Compiling the %s (%s), once.", self.what, self.variant)
            with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
                shutil.copyfile(self._compiled(Path(scratch)), folder / LIBRARY)
            return {"compiler": version_of(self.compiler), "flags": self.flags}

        name = f"{self._name()}-{_digest(self.compiler, version_of(self.compiler))}"
        try:
            _make_private(cache_folder() / FOLDER)
            return cached(f"{FOLDER}/{name}", build) / LIBRARY
        except NotBuilt:
            raise
        except CompressError as error:
            warn_once(f"{error} Until then, every process compiles the {self.what} anew.")
            return None

    def _left_behind(self) -> Path | None:
        """A file of these sources in the cache, whichever compiler made it."""
        folder = cache_folder() / FOLDER
        found = sorted(folder.glob(f"{self._name()}-*/{LIBRARY}"))
        if found:
            _check_private(folder)
        return next(iter(found), None)

    def _name(self) -> str:
        sources = ((file.name, file.read_bytes()) for file in sorted(self.folder.iterdir()))
        return f"{self.variant.replace(' ', '-')}-{_digest(self.flags, *sources)}"

    def _compiled(self, folder: Path) -> Path:
        """Compiles all sources at the same time, and links them."""
        sources = sorted(self.folder.glob(self.pattern), key=lambda file: -file.stat().st_size)

        def compile_one(source: Path) -> str:
            made = str(folder / f"{source.stem}.o")
            _run([*self.compiler, *self.flags, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        made = folder / LIBRARY
        _run([*self.compiler, *self.flags, "-shared", *self.link, *objects, "-o", str(made)])
        return made


@cache
def warn_once(sentence: str) -> None:
    log.warning("%s", sentence)  # each once


@cache
def version_of(compiler: Sequence[str]) -> str:
    """What a compiler says about itself, in one line.

    Raises:
        NotBuilt: it cannot be run, or fails.
    """
    return " ".join(_run([*compiler, "--version"]).split())


def _make_private(folder: Path) -> None:
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


def _digest(*parts: object) -> str:
    """Twelve digits that differ where the parts do."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _run(command: list[str]) -> str:
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
