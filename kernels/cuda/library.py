"""The CUDA kernels in use: whether they are wanted, and what happens where they cannot be had.

They take over on a CUDA device wherever they can be compiled and loaded. Otherwise Triton or plain torch
takes their place, and one sentence says why. If they were asked for by name, that is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import RLock
from typing import TypeVar

import torch

from compress.errors import BadInput, CompressError
from compress.kernels.cuda.build import built
from compress.kernels.native import ABLE, NAMED, OFF, NotBuilt, warn_once
from compress.kernels.triton import library as triton

CUDA = "cuda"

Result = TypeVar("Result")


class _State:
    lock = RLock()
    wanted = ABLE
    loaded: dict[tuple[int, int], ctypes.CDLL | NotBuilt] = {}  # noqa: RUF012


def wanted() -> int:
    """One of `OFF`, `ABLE` and `NAMED`."""
    return _State.wanted


def want(how: int) -> None:
    """Set what `wanted` gives, in this process from now on.

    Raises:
        BadInput: they are asked for by name, but there is no CUDA device.
        CompressError: they are asked for by name, but cannot be compiled or loaded.
    """
    if how == NAMED:
        if not torch.cuda.is_available():
            raise BadInput(
                "There is no CUDA device here that torch can use, so the kernel 'cuda' cannot run."
            )
        load(torch.cuda.get_device_capability())
    _State.wanted = how


def load(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for a compute capability, compiled and loaded on first use.

    Raises:
        CompressError: it cannot be compiled or loaded.
    """
    with _State.lock:
        if capability not in _State.loaded:
            try:
                with built(capability) as file:
                    _State.loaded[capability] = ctypes.CDLL(str(file))
            except (OSError, CompressError) as error:  # as in a folder from which nothing may be executed
                _State.loaded[capability] = NotBuilt(str(error).rstrip("."))
        found = _State.loaded[capability]
    if isinstance(found, NotBuilt):
        raise CompressError(f"The CUDA kernels cannot be used here: {found}.")
    return found


def library(device: torch.device) -> ctypes.CDLL | None:
    """The loaded library for a CUDA device; None if plain torch is used there.

    Raises:
        CompressError: the kernels were asked for by name and cannot be compiled or loaded.
    """
    if _State.wanted == OFF:
        return None
    try:
        return load(torch.cuda.get_device_capability(device))
    except CompressError as error:
        if _State.wanted == NAMED:
            raise
        if triton.usable(device):
            warn_once(f"{error} Triton multiplies with packed weights instead.")
        elif triton.wanted() == OFF:
            warn_once(f"{error} Packed layers run in plain torch on the GPU, which is slower.")
        else:
            warn_once(str(error))  # Triton has just said what follows
        return None


def kernel_name(device: torch.device) -> str | None:
    """``cuda`` where these kernels run; None on any other device, and if plain torch is used."""
    able = device.type == CUDA and torch.cuda.is_available() and library(device) is not None
    return CUDA if able else None


def start(
    tensors: tuple[torch.Tensor | None, ...], call: Callable[[ctypes.CDLL, int], tuple[Result, int]]
) -> Result | None:
    """Start a kernel on the device of some tensors, in torch's current stream, without waiting for it.

    Args:
        tensors: that it is given; the first is there.
        call: is given the library and the stream; returns a result, and the error of the launch.

    Returns:
        The result; None if plain torch is to compute it: on another device, with tensors of several devices
        (which torch refuses in its own words), or if the driver cannot run what was compiled.

    Raises:
        CompressError: kernels that were asked for by name cannot be used.
    """
    first = tensors[0]
    assert first is not None
    if any(tensor is not None and tensor.device != first.device for tensor in tensors):
        return None
    native = library(first.device)
    if native is None:
        return None
    with torch.cuda.device(first.device):
        result, error = call(native, torch.cuda.current_stream().cuda_stream)
    if not error:
        return result
    capability = torch.cuda.get_device_capability(first.device)
    reason = NotBuilt(f"the driver does not start them (CUDA error {error})")
    with _State.lock:
        _State.loaded[capability] = reason
    library(first.device)  # says so
    return None
