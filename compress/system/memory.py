"""Amounts of memory in bytes: what a user asks for, what this process takes, and what is available."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from compress.errors import BadInput

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
"""Unit in capital letters -> bytes: K, KB, M, MB and so on are powers of 1000; KIB, MIB and so on of 1024."""


def parse_memory(text: str | int) -> int:
    """An amount of memory in bytes: ``90MB`` is 90000000 (powers of 1000), ``90MiB`` 94371840 (of 1024).

    Raises:
        BadInput: ``text`` is not an amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise BadInput(f"'{text}' is not an amount of memory; write it like 90MB or 1.5GB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def reset_peak_memory() -> None:
    """Make `peak_memory` count from now on. Where the system cannot do that, it counts from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux resets VmHWM when a program starts. ``getrusage`` keeps the value of the parent process at the fork,
    so it is used only where there is no /proc. It counts kilobytes on Linux and bytes on macOS.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return freed memory to the system, if the C library can do that (glibc).

    On its own, glibc keeps free memory that lies between memory in use. If a small tensor that outlives its
    layer takes the place of a weight, the hole beside it is too small for the weight of the next layer. So
    memory would grow by some weights with every layer of a walk through a model.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def available_memory() -> int:
    """The memory that can be allocated without swapping, in bytes."""
    return psutil.virtual_memory().available
