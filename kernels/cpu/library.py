"""The native library in use: which path was asked for, which one runs, and what happens where none does.

A process has one kernel at a time. ``auto`` takes the best path that can be compiled and loaded, and
otherwise plain torch (``reference``), saying once why. What is asked for by name runs, or is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from compress.errors import BadInput, CompressError
from compress.kernels.cpu import processor
from compress.kernels.cpu.build import built
from compress.kernels.cpu.processor import paths
from compress.kernels.cuda import library as cuda
from compress.kernels.native import ABLE, NAMED, OFF, NotBuilt, warn_once
from compress.kernels.triton import library as triton

__all__ = ["AUTO", "CPU", "REFERENCE", "kernel_name", "library", "load", "paths", "use", "using"]


AUTO, CPU, REFERENCE = "auto", "cpu", "reference"


class _State:
    lock = RLock()
    decided = False
    path: str | None = None
    library: ctypes.CDLL | None = None
    loaded: dict[str, ctypes.CDLL | NotBuilt] = {}  # noqa: RUF012


def use(name: str) -> None:
    """Choose the kernel of this process.

    Args:
        name: ``auto``, ``reference``, ``cuda``, ``triton``, ``cpu`` (the best path), or ``cpu:`` and one
            of `paths`. A name of the one device leaves the other to ``auto``.

    Raises:
        BadInput: there is no such kernel, or this processor cannot run it, or there is no CUDA device.
        CompressError: it was asked for by name and cannot be compiled or loaded.
    """
    with _State.lock:
        if name in (cuda.CUDA, triton.TRITON):
            named, other = (cuda, triton) if name == cuda.CUDA else (triton, cuda)
            named.want(NAMED)
            other.want(OFF)
            _State.decided = False
            return
        if name == AUTO:
            _State.decided = False
        elif name == REFERENCE:
            _decide(None)
        else:
            _decide(_best() if name == CPU else _named(name))
        cuda.want(OFF if name == REFERENCE else ABLE)
        triton.want(cuda.wanted())


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use a kernel for the length of a ``with`` block. Argument and errors are those of `use`."""
    with _State.lock:
        before = _State.decided, _State.path, _State.library
        before_gpu = cuda.wanted(), triton.wanted()
    use(name)
    try:
        yield
    finally:
        with _State.lock:
            _State.decided, _State.path, _State.library = before
            cuda.want(before_gpu[0])
            triton.want(before_gpu[1])


def library() -> ctypes.CDLL | None:
    """The loaded library of the path in use; None if the plain torch kernels are in use."""
    if not _State.decided:
        with _State.lock:
            if not _State.decided:
                _decide_by_itself()
    return _State.library


def kernel_name() -> str:
    """The kernel in use, as `use` takes it: ``cpu:avx512``, or ``reference``."""
    library()
    return f"{CPU}:{_State.path}" if _State.path else REFERENCE


def load(path: str) -> ctypes.CDLL:
    """The library of a path, compiled and loaded on first use. It does not change which one is in use.

    Raises:
        CompressError: it cannot be compiled or loaded.
    """
    import torch  # noqa: F401  (its OpenMP comes first, so that ours is the same, with its number of threads)

    with _State.lock:
        if path not in _State.loaded:
            try:
                with built(path) as file:
                    _State.loaded[path] = ctypes.CDLL(str(file))
            except (OSError, CompressError) as error:  # as in a folder from which nothing may be executed
                _State.loaded[path] = NotBuilt(str(error).rstrip("."))
        found = _State.loaded[path]
    if isinstance(found, NotBuilt):
        raise CompressError(f"The CPU kernels ({path}) cannot be built here: {found}.")
    return found


def _decide(path: str | None) -> None:
    _State.library = load(path) if path else None
    _State.path, _State.decided = path, True


def _decide_by_itself() -> None:
    try:
        _decide(_best())
    except CompressError as error:
        warn_once(f"{error} Packed layers run in plain torch, which is slower.")
        _decide(None)


def _best() -> str:
    """The first path that can be loaded. Old compilers do not know the newest instructions.

    Raises:
        CompressError: there is none.
    """
    reasons: list[CompressError] = []
    for path in paths():
        try:
            load(path)
        except CompressError as error:
            reasons.append(error)
            continue
        if reasons:
            warn_once(f"{reasons[0]} The path {path} is used instead.")
        return path
    raise reasons[0]


def _named(name: str) -> str:
    kind, _, path = name.partition(":")
    able = ", ".join([AUTO, REFERENCE, CPU, *(f"{CPU}:{path}" for path in paths()), *_gpu()])
    if kind != CPU or path not in processor.PATHS:
        raise BadInput(f"There is no kernel '{name}'; this machine can run: {able}.")
    if path not in paths():
        raise BadInput(f"This processor cannot run the kernel '{name}'; it can run: {able}.")
    return path


def _gpu() -> list[str]:
    import torch

    return [cuda.CUDA, triton.TRITON] if torch.cuda.is_available() else []
