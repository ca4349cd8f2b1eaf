"""Runs CUDA kernels on the CPU: compiles a .cu file as it stands, calls its functions, and watches memory.

`Kernels` loads a source. `watched` lends kernels tensors in one of the `SCHEDULES`, and `check` turns what the
emulation finds wrong (an access out of bounds, a race, a barrier that some threads never reach) into an
`EmulationError`. See include/emulation.h for how it works.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INCLUDE, RUNTIME = HERE / "include", HERE / "source"
CUDA = ROOT / "kernels" / "cuda" / "source"
BUILT = ROOT / ".pytest_cache" / "emulation"

SCHEDULES = ("forward", "reverse", "random")
"""Orders in which threads and blocks run. Asynchronous copies land when they are waited for in the first, at
once in the second, and at either time in the third, which also changes threads in the midst of things."""

COMMON = ("-std=c++17", "-fPIC", "-mavx2", "-mfma", "-mf16c", "-fno-strict-aliasing", "-g0")
KERNEL = (
    *("-x", "c++", "-O1", "-include", "cuda_runtime.h", "-Wno-unknown-pragmas", "-fno-extern-tls-init"),
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-ffp-contract=off"),
)
DYNAMIC_SHARED = 227 << 10
"""Bytes of dynamic shared memory that there is room for."""

FAILED = 719
"""The error of a launch that the emulation stopped."""


class EmulationError(AssertionError):
    """A kernel did what it must not do. The message says which thread did what, and where."""


@dataclass
class Traffic:
    """Bytes of a tensor that a call moved.

    Attributes:
        read, written: by loads and stores, each counted as often as it is done.
        copied: the part of ``read`` that asynchronous copies made up.
        sectors: bytes of all sectors of 32 bytes that were read at least once.
    """

    read: int
    written: int
    copied: int
    sectors: int


@dataclass
class Counts:
    """What a call did.

    Attributes:
        traffic: of each tensor, by its name.
        multiply_adds: fused multiply-adds of numbers, those of tensor cores included.
        shared_bytes: bytes loaded from and stored to shared memory.
    """

    traffic: dict[str, Traffic] = field(default_factory=dict)
    multiply_adds: int = 0
    shared_bytes: int = 0


def require() -> str:
    """The compiler that emulates; tests are skipped aloud where there is none, or another processor."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("kernels are emulated by g++ on x86-64 under Linux only")
    return compiler


class Kernels:
    """The C functions of a .cu file.

    Args:
        source: the file.
        changes: texts to replace in it first, to plant a bug. Each must occur.
        defines: macros.
    """

    def __init__(
        self, source: Path, changes: Mapping[str, str] | None = None, defines: Mapping[str, str] | None = None
    ) -> None:
        text = source.read_text()
        for old, new in (changes or {}).items():
            assert old in text, f"{source.name} has no '{old}' to plant a bug at."
            text = text.replace(old, new)
        self.runtime = runtime()
        self.library = ctypes.CDLL(str(compiled(source, text, tuple((defines or {}).items()))))

    def __call__(
        self,
        name: str,
        *arguments: torch.Tensor | int | float | None,
        written: tuple[torch.Tensor, ...] = (),
        schedule: str = "forward",
        strict: bool = True,
        seed: int = 1,
    ) -> Counts:
        """Call a function, with a null stream as its last argument.

        Args:
            name: of the function.
            arguments: tensors are handed over as pointers, and may be reached only within their bounds.
            written: those of the tensors that may be written to.
            schedule: one of `SCHEDULES`.
            strict: also look for races, and for barriers that some threads never reach.
            seed: of the random schedule.

        Raises:
            EmulationError: the kernel does something wrong, or the function returns an error.
        """
        tensors = {f"argument {i}": a for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
        outputs = {tensor.data_ptr() for tensor in written}
        with watched(tensors, outputs, schedule, strict, seed) as counts:
            function = getattr(self.library, name)
            function.restype = ctypes.c_int
            check(function(*(native(argument) for argument in arguments), None))
        return counts


def native(argument: torch.Tensor | int | float | None) -> object:
    """An argument as ctypes takes it."""
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)


def check(error: int) -> None:
    """Raise what the emulation, or else a function, found wrong.

    Raises:
        EmulationError: there was something.
    """
    failure = runtime().emulation_failure().decode()
    if failure or error:
        raise EmulationError(failure or f"the function returns error {error}")


@contextmanager
def watched(
    tensors: Mapping[str, torch.Tensor],
    outputs: set[int],
    schedule: str = "forward",
    strict: bool = True,
    seed: int = 1,
    capability: int = 80,
    shared_limit: int = 99 << 10,
) -> Iterator[Counts]:
    """Let kernels reach some tensors only. The counts are there when the block has ended.

    Args:
        tensors: by their names.
        outputs: addresses of those that may be written to.
        schedule, strict, seed: as in `Kernels.__call__`.
        capability: of the device, times ten.
        shared_limit: bytes of dynamic shared memory that the device lets a block have.
    """
    library = runtime()
    library.emulation_set(SCHEDULES.index(schedule), strict, seed, shared_limit, capability)
    library.emulation_forget()
    library.emulation_forgive()
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        library.emulation_register(name.encode(), tensor.data_ptr(), size, tensor.data_ptr() in outputs)
    counts = Counts()
    yield counts
    for number, name in enumerate(tensors):
        four = (ctypes.c_int64 * 4)()
        library.emulation_counts(number, four)
        counts.traffic[name] = Traffic(*four)
    counts.multiply_adds = library.emulation_multiply_adds()
    counts.shared_bytes = library.emulation_shared_bytes()


@cache
def runtime() -> ctypes.CDLL:
    """The emulation itself, which all libraries of kernels share."""
    compiler = require()
    sources = sorted(RUNTIME.glob("*.cpp"))
    key = digest(*COMMON, version(compiler), *(file.read_text() for file in (*headers(), *sources)))
    made = BUILT / f"emulation-{key}.so"

    def build(scratch: Path) -> Path:
        flags = (*COMMON, "-O3", "-fno-trapping-math", "-shared", "-o", str(scratch / "made.so"))
        run(compiler, *flags, *map(str, sources), "-ldl")
        return scratch / "made.so"

    library = ctypes.CDLL(str(kept(made, build)), mode=ctypes.RTLD_GLOBAL)
    number, pointer, text = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    library.emulation_set.argtypes = (ctypes.c_int, ctypes.c_int, number, number, number)
    library.emulation_register.argtypes = (text, pointer, number, ctypes.c_int)
    library.emulation_counts.argtypes = (number, pointer)
    library.emulation_failure.restype = text
    library.emulation_multiply_adds.restype = library.emulation_shared_bytes.restype = number
    return library


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


DYNAMIC = "emulation_dynamic_shared"


def headers() -> list[Path]:
    return sorted((*INCLUDE.iterdir(), *RUNTIME.glob("*.h")))


def kept(made: Path, build) -> Path:  # type: ignore[no-untyped-def]
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
