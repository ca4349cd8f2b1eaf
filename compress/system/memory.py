"""Amounts of memory, in bytes: what a user asks for, and what this process takes."""

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


def parse_memory(text: str | int) -> int:
    """Bytes: 90000000 of ``90MB`` (powers of 1000), 94371840 of ``90MiB`` (powers of 1024).

    Raises:
        BadInput: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise BadInput(f"'{text}' is not an amount of memory; write it like 90MB or 1.5GB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can; elsewhere it counts from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux's VmHWM starts anew with the program; ``getrusage`` keeps what the parent had at the fork, so it
    serves only where there is no /proc (and counts kilobytes on Linux, bytes on macOS).
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Of itself it keeps free blocks that lie between blocks in use. A small tensor that outlives its layer, put
    where a weight was, leaves a hole too small for the next layer's weight, so that a walk through a model
    would grow by some weights with every layer.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def available_memory() -> int:
    """Memory that can be had without swapping, in bytes."""
    return psutil.virtual_memory().available
