"""Runs CUDA kernels on the CPU: compiles a .cu file as it stands, calls its functions, and watches memory.

`Kernels` loads a source. `watched` lends kernels tensors in one of the `SCHEDULES`, and `check` turns what
the emulation finds wrong (an access out of bounds, a race, a barrier that some threads never reach) into an
`EmulationError`. See include/emulation.h for how it works.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from tests.emulation.build import compiled, emulation

SCHEDULES = ("forward", "reverse", "random")
"""Orders in which threads and blocks run. Asynchronous copies land when they are waited for in the first, at
once in the second, and at either time in the third, which also changes threads in the midst of things."""


FEWER = {
    "if (type == FLOAT16) return multiplied<Source, half>(p, stream);": "",
    "if (tiles == 2) return run(multiply<Source, T, 2>, 2, ROWS, THREADS);": "",
    "return run(multiply_many<Source, T, 2>, 2, MANY_ROWS, MANY_THREADS);": "return cudaErrorInvalidValue;",
    "return run(multiply_many<Source, T, 8>, 8, MANY_ROWS, MANY_THREADS);": "return cudaErrorInvalidValue;",
    "run(multiply<Source, T, MOST_TILES>, MOST_TILES, ROWS, THREADS);": "cudaErrorInvalidValue;",
}
"""Changes to multiply.cuh that leave few of its kernels, which are sooner compiled: bfloat16, for up to eight
rows of an input and for 17 to 32."""


class EmulationError(AssertionError):
    """A kernel did what it must not do. The message says which thread did what, and where."""


@dataclass
class Traffic:
    """Bytes of a tensor that a call moved.

    Attributes:
        read, written: by loads and stores, each counted as often as it is done.
        copied: the part of ``read`` that asynchronous copies made up.
        sectors: bytes of all sectors of 32 bytes that were read at least once: what memory must give.
        fetched: bytes of the sectors that warps ask for, where the lanes of a load ask for a sector once:
            what comes to the multiprocessors. Only strict calls count them.
    """

    read: int
    written: int
    copied: int
    sectors: int
    fetched: int


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

    def add(self, other: Counts) -> None:
        """Add what another call did."""
        for name, moved in other.traffic.items():
            before = self.traffic.get(name, Traffic(0, 0, 0, 0, 0))
            pairs = zip(astuple(before), astuple(moved))
            self.traffic[name] = Traffic(*(one + more for one, more in pairs))
        self.multiply_adds += other.multiply_adds
        self.shared_bytes += other.shared_bytes


class Kernels:
    """The C functions of a .cu file.

    Args:
        source: the file.
        changes: texts to replace in it and in its own headers first, to plant a bug. Each must occur.
        defines: macros.
    """

    def __init__(
        self, source: Path, changes: Mapping[str, str] | None = None, defines: Mapping[str, str] | None = None
    ) -> None:
        text = with_headers(source, set()) if changes else source.read_text()
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


def with_headers(file: Path, seen: set[Path]) -> str:
    """What a source says with the headers beside it in the place of their includes, all but ptx.cuh."""
    seen.add(file)

    def header(found: re.Match[str]) -> str:
        inside = file.parent / found[1]
        if inside.name == "ptx.cuh" or not inside.exists():
            return found[0]
        return "" if inside in seen else with_headers(inside, seen)

    text = file.read_text().replace("#pragma once\n", "")
    return re.sub(r'^#include "(\S+)"$', header, text, flags=re.M)


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
        five = (ctypes.c_int64 * 5)()
        library.emulation_counts(number, five)
        counts.traffic[name] = Traffic(*five)
    counts.multiply_adds = library.emulation_multiply_adds()
    counts.shared_bytes = library.emulation_shared_bytes()


@cache
def runtime() -> ctypes.CDLL:
    """The emulation itself, which all libraries of kernels share."""
    library = ctypes.CDLL(str(emulation()), mode=ctypes.RTLD_GLOBAL)
    number, pointer, text = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    library.emulation_set.argtypes = (ctypes.c_int, ctypes.c_int, number, number, number)
    library.emulation_register.argtypes = (text, pointer, number, ctypes.c_int)
    library.emulation_counts.argtypes = (number, pointer)
    library.emulation_failure.restype = text
    library.emulation_multiply_adds.restype = library.emulation_shared_bytes.restype = number
    return library


class Device:
    """Stands in for a CUDA device under code that hands tensors of the CPU to a library of kernels.

    Within ``with``, kernels may reach those tensors only whose addresses the code has asked for, and memory
    that torch leaves uninitialised is NaN.

    Args:
        kernels: that the code calls, through `library`.
        inputs: tensors that kernels must not write to.
        schedule, strict, seed: as in `Kernels.__call__`.
        capability, shared_limit: as in `watched`.

    Attributes:
        counts: of the calls so far, added up; traffic is listed by the address of a tensor (see `traffic`).
    """

    def __init__(
        self, kernels: Kernels, inputs: Iterable[torch.Tensor] = (), **settings: str | bool | int
    ) -> None:
        self.kernels, self.settings = kernels, settings
        self.inputs = {tensor.data_ptr() for tensor in inputs}
        self.counts = Counts()
        self.known: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Self:
        self._ask, self._strictly = torch.Tensor.data_ptr, torch.are_deterministic_algorithms_enabled()
        ask, known = self._ask, self.known

        def data_ptr(tensor: torch.Tensor) -> int:
            address = ask(tensor)
            known[address] = tensor  # also keeps its memory from being used again
            return address

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        torch.use_deterministic_algorithms(True)
        return self

    def __exit__(self, *_: object) -> None:
        torch.Tensor.data_ptr = self._ask  # type: ignore[method-assign]
        torch.use_deterministic_algorithms(self._strictly)

    @property
    def library(self) -> Any:
        """Has the functions of the kernels, as a ``ctypes.CDLL`` has."""
        return _Library(self)

    def call(self, function: Any, arguments: tuple[object, ...]) -> int:
        """Call a C function and look at what it has done.

        Raises:
            EmulationError: the kernel does something wrong, or the function returns an error.
        """
        tensors = {str(address): tensor for address, tensor in self.known.items() if tensor.numel()}
        with watched(tensors, set(self.known) - self.inputs, **self.settings) as counts:  # type: ignore[arg-type]
            error = function(*arguments)
            check(error)
        self.counts.add(counts)
        return error

    def traffic(self, tensor: torch.Tensor) -> Traffic:
        """What the calls so far have moved of a tensor."""
        return self.counts.traffic[str(tensor.data_ptr())]


class _Library:
    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> _Function:
        return _Function(self.device, getattr(self.device.kernels.library, name))


class _Function:
    """A C function; ``argtypes`` and ``restype`` are handed on to it."""

    def __init__(self, device: Device, function: Any) -> None:
        self.__dict__.update(device=device, function=function)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.function, name, value)

    def __call__(self, *arguments: object) -> int:
        return self.device.call(self.function, arguments)
