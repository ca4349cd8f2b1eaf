"""Large pages of memory for weights: with small ones, a processor spends time on looking up addresses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch

PAGE = 2 << 20
"""Bytes of a large page, on x86 and on Arm with small pages of 4 KiB."""

MADV_COLLAPSE = 25
"""The advice to the Linux kernel, from 6.1 on, to put a range of addresses into large pages now."""


def into_large_pages(*tensors: torch.Tensor | None) -> None:
    """Put the memory of tensors on a CPU into large pages, together with what lies around it.

    Nothing that can be read from them changes; it is a matter of speed alone. So nothing happens where it
    cannot be done: on other systems than Linux, before 6.1, and where no large page is free.
    """
    advise = _advise()
    for tensor in tensors:
        if advise is not None and tensor is not None and tensor.device.type == "cpu":
            start = tensor.data_ptr() // PAGE * PAGE
            # One at a time, because the system gives up a range at the first page that it cannot make.
            for page in range(start, tensor.data_ptr() + tensor.nbytes, PAGE):
                advise(page, PAGE, MADV_COLLAPSE)


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``, which answers with an error code and never raises; None without one."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
