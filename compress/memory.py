"""Amounts of memory, in bytes: what a user asks for, and what this process takes."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

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


def available_memory() -> int:
    """Memory that can be had without swapping, in bytes."""
    return psutil.virtual_memory().available
