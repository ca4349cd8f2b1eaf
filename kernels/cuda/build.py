"""Compiles the CUDA sources for an architecture, once for each user: the result stays in the cache.

Without nvcc this fails; `compress.kernels.cuda.library` says so and goes on in plain torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.kernels.cpu.build import (
    FOLDER,
    LIBRARY,
    SCRATCH,
    NotBuilt,
    digest,
    make_private,
    run,
    warn_once,
)
from compress.system.cache import cache_folder, cached

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
"""The folder of the CUDA sources."""

OLDEST = (8, 0)
"""The oldest compute capability that has the instructions of the kernels."""

FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")


@contextmanager
def built(capability: tuple[int, int]) -> Iterator[Path]:
    """The library file for a compute capability, compiled on first use. It may be gone after the block.

    As for the kernels of the CPU (see `compress.kernels.cpu.build.built`), two processes compile it once, and
    if the cache cannot be written, the file lies in a temporary folder.

    Args:
        capability: of the GPU, as in (9, 0).

    Raises:
        NotBuilt: the GPU is too old, or there is no nvcc, or it fails.
    """
    if capability < OLDEST:
        raise NotBuilt(f"they need a GPU of compute capability {_dotted(OLDEST)}, not {_dotted(capability)}")
    nvcc = find_nvcc()
    if file := _cached(capability, nvcc) if nvcc else _left_behind(capability):
        yield file
    elif nvcc:
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            yield _compiled(capability, nvcc, Path(scratch))
    else:
        raise NotBuilt(
            "there is no nvcc (on the PATH, in $CUDA_HOME, or from 'pip install compress-model[cuda]')"
        )


def find_nvcc() -> str | None:
    """The compiler of CUDA: on the PATH, in ``$CUDA_HOME``, or in the package nvidia-cuda-nvcc; or None."""
    if found := shutil.which("nvcc"):
        return found
    folders = [Path(home, "bin")] if (home := os.environ.get("CUDA_HOME")) else []
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"), reverse=True)
    return next((found for folder in folders if (found := shutil.which("nvcc", path=str(folder)))), None)


def _cached(capability: tuple[int, int], nvcc: str) -> Path | None:
    """The file in the cache, compiled if it is not there yet; None if it cannot be there."""

    def build(folder: Path) -> dict[str, Any]:
        log.info("Compiling the CUDA kernels (compute capability %s), once.", _dotted(capability))
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            shutil.copyfile(_compiled(capability, nvcc, Path(scratch)), folder / LIBRARY)
        return {"compiler": _version(nvcc), "flags": _flags(capability)}

    name = f"{_name(capability)}-{digest(nvcc, _version(nvcc))}"
    try:
        make_private(cache_folder() / FOLDER)
        return cached(f"{FOLDER}/{name}", build) / LIBRARY
    except NotBuilt:
        raise
    except CompressError as error:
        warn_once(f"{error} Until then, every process compiles the CUDA kernels anew.")
        return None


def _left_behind(capability: tuple[int, int]) -> Path | None:
    """A file of these sources in the cache, whichever nvcc made it."""
    folder = cache_folder() / FOLDER
    found = sorted(folder.glob(f"{_name(capability)}-*/{LIBRARY}"))
    if found:
        make_private(folder)
    return next(iter(found), None)


def _name(capability: tuple[int, int]) -> str:
    sources = ((file.name, file.read_bytes()) for file in sorted(SOURCE.iterdir()))
    return f"cuda{_dotted(capability)}-{digest(_flags(capability), *sources)}"


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _flags(capability: tuple[int, int]) -> tuple[str, ...]:
    return (*FLAGS, "-arch=sm_{}{}".format(*capability))


@cache
def _version(nvcc: str) -> str:
    return run([nvcc, "--version"]).strip().replace("\n", " ")


def _compiled(capability: tuple[int, int], nvcc: str, folder: Path) -> Path:
    """Compiles all sources at the same time, and links them."""
    sources = sorted(SOURCE.glob("*.cu"), key=lambda file: -file.stat().st_size)

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        run([nvcc, *_flags(capability), "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    # Packages have their libraries in lib, where nvcc does not look.
    libraries = (f"-L{Path(nvcc).resolve().parents[1] / name}" for name in ("lib", "lib64"))
    run([nvcc, *_flags(capability), "-shared", *libraries, *objects, "-o", str(folder / LIBRARY)])
    return folder / LIBRARY
