"""What is compiled for the CPU: the C++ sources, for a path.

Without a compiler this fails; `compress.kernels.cpu.library` says so and goes on in plain torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from compress.kernels.cpu.processor import PATHS
from compress.kernels.native import NativeLibrary, NotBuilt, version_of

SOURCE = Path(__file__).parent / "source"
"""The folder of the native sources."""

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, after ``$CXX``."""

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC")


def built(path: str) -> AbstractContextManager[Path]:
    """The library file of a path for the length of a ``with`` block (see `NativeLibrary.built`).

    Args:
        path: one of `PATHS`.

    Raises:
        NotBuilt: on entering the block: there is no compiler, or it fails.
    """
    return NativeLibrary(
        what="CPU kernels",
        variant=path,
        folder=SOURCE,
        pattern="*.cpp",
        compiler=find_compiler() or (),
        flags=(*FLAGS, *PATHS[path].flags),
        link=(),
        missing=f"there is no C++ compiler (looked for $CXX, {', '.join(COMPILERS)})",
    ).built()


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
        return f"{' '.join(compiler)}: {version_of(compiler)}"
    except NotBuilt:
        return None
