"""Compiles the emulation, and .cu files for it; what has not changed is kept from run to run."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INCLUDE, RUNTIME = HERE / "include", HERE / "source"
CUDA = ROOT / "kernels" / "cuda" / "source"
BUILT = ROOT / ".pytest_cache" / "emulation"

COMMON = ("-std=c++17", "-fPIC", "-mavx2", "-mfma", "-mf16c", "-fno-strict-aliasing", "-g0")
KERNEL = (
    *("-x", "c++", "-O1", "-include", "cuda_runtime.h", "-Wno-unknown-pragmas", "-fno-extern-tls-init"),
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-ffp-contract=off"),
)
DYNAMIC = "emulation_dynamic_shared"
"""The symbol of dynamic shared memory."""

DYNAMIC_SHARED = 227 << 10
"""Bytes of dynamic shared memory that there is room for."""


def require() -> str:
    """The compiler that emulates; tests are skipped aloud where there is none, or another processor."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("kernels are emulated by g++ on x86-64 under Linux only")
    return compiler


def emulation() -> Path:
    """The library of the emulation itself, which all libraries of kernels share."""
    compiler = require()
    sources = sorted(RUNTIME.glob("*.cpp"))
    key = digest(*COMMON, version(compiler), *(file.read_text() for file in (*headers(), *sources)))

    def build(scratch: Path) -> Path:
        flags = (*COMMON, "-O2", "-ftree-vectorize", "-shared", "-o", str(scratch / "made.so"))
        run(compiler, *flags, *map(str, sources), "-ldl")
        return scratch / "made.so"

    return kept(BUILT / f"emulation-{key}.so", build)


def compiled(source: Path, text: str, defines: tuple[tuple[str, str], ...] = ()) -> Path:
    """The library of a source, from the cache where nothing that it is made of has changed.

    Args:
        source: the file.
        text: what it says, or what it says with a planted bug.
        defines: macros and their values.
    """
    compiler = require()
    beside = sorted({*source.parent.glob("*.cuh"), *source.parent.glob("*.h"), *CUDA.glob("*.cuh")})
    parts = (file.read_text() for file in (*headers(), *beside))
    flags = (*KERNEL, *COMMON, *(f"-D{name}={value}" for name, value in defines))
    key = digest(*flags, version(compiler), text, *parts)

    def build(scratch: Path) -> Path:
        (scratch / source.name).write_text(text)
        made = scratch / "kernels.o"
        folders = (f"-I{folder}" for folder in (INCLUDE, source.parent, CUDA))
        run(compiler, *folders, *flags, "-c", str(scratch / source.name), "-o", str(made))
        storage = scratch / "shared.s"
        storage.write_text(shared_memory(made))
        run(compiler, "-shared", str(made), str(storage), "-o", str(scratch / "kernels.so"))
        return scratch / "kernels.so"

    return kept(BUILT / f"{source.stem}-{key}.so", build)


def shared_memory(made: Path) -> str:
    """Assembler text that gives all ``extern __shared__`` arrays of an object one thread-local storage."""
    symbols = run("readelf", "--wide", "--symbols", str(made)).splitlines()
    names = [match[1] for line in symbols if (match := re.search(r"\bTLS\b.*\bUND\s+(\S+)", line))]
    labels = "".join(f".globl {name}\n.type {name}, @object\n{name}:\n" for name in [*names, DYNAMIC])
    head = '.section .tbss,"awT",@nobits\n.balign 1024\n'
    return f'{head}{labels}.zero {DYNAMIC_SHARED}\n.section .note.GNU-stack,"",@progbits\n'


def headers() -> list[Path]:
    return sorted((*INCLUDE.iterdir(), *RUNTIME.glob("*.h")))


def kept(made: Path, build: Callable[[Path], Path]) -> Path:
    """A file of the cache, built in a scratch folder beside it if it is not there; one process builds it."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            scratch = made.with_suffix(".scratch")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            build(scratch).rename(made)
            shutil.rmtree(scratch)
    return made


@cache
def version(compiler: str) -> str:
    return run(compiler, "--version").partition("\n")[0]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run(*command: str) -> str:
    """The output of a program.

    Raises:
        AssertionError: it fails; the message is what it says.
    """
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stderr[:6000]}"
    return ended.stdout
