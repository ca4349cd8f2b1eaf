"""Resident memory of this process, in bytes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil


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
