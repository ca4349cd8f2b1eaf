"""The paths of the CPU kernels, and which of them this processor can run.

A path is one instruction set. All native sources are compiled with its flags into a library of its own.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux lists what the processor can do, as far as the system lets programs use it."""

AMX_PERMISSION = (158, 0x1023, 18)
"""arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux gives tiles only to who asks for them."""


@dataclass(frozen=True)
class Instructions:
    """One path: the compiler's flags, and the features that they take (in words of /proc/cpuinfo)."""

    flags: tuple[str, ...]
    needs: frozenset[str]


def _x86(flags: str, needs: str, base: Instructions | None = None) -> Instructions:
    return Instructions(
        (*(base.flags if base else ()), *flags.split()),
        frozenset(needs.split()) | (base.needs if base else frozenset()),
    )


_AVX512 = _x86(
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma -mf16c",
    "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 fma f16c",
)

PATHS = {
    "amx": _x86("-mamx-tile -mamx-bf16", "amx_tile amx_bf16", _AVX512),
    "avx512": _AVX512,
    "avx2": _x86("-mavx2 -mfma -mf16c", "avx2 fma f16c"),
    "neon": Instructions(("-march=armv8.2-a+dotprod",), frozenset({"asimd", "asimddp"})),
    "portable": Instructions((), frozenset()),
}
"""Every path by its name, the best first. The last one needs nothing, so some path runs everywhere."""


@cache
def paths() -> tuple[str, ...]:
    """The names of the paths that this processor can run, the best first."""
    found = features()
    able = [name for name, path in PATHS.items() if path.needs <= found]
    return tuple(name for name in able if name != "amx" or _may_use_tiles())


def features() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo; empty where nothing is known."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"asimd", "asimddp"})  # of every processor that macOS runs on as arm64
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, names = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(names.split())
    return frozenset()


def multiplies_bfloat16() -> bool | None:
    """Whether the processor has instructions for products of bfloat16; None where that is not known."""
    found = features()
    known = found and sys.platform == "linux"
    return bool(found & {"avx512_bf16", "amx_bf16", "bf16"}) if known else None


def _may_use_tiles() -> bool:
    return ctypes.CDLL(None).syscall(*AMX_PERMISSION) == 0
