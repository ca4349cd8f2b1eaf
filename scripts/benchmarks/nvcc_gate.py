#!/usr/bin/env python
"""Compile the CUDA kernels for every architecture without a GPU, and look at what came out.

For every kernel: registers and shared memory as the assembler reports them, and the instructions of its
machine code. It fails if a kernel spills registers, has more of them than `MOST_REGISTERS`, or lacks an
instruction that it was written for (`EXPECTED`): tensor cores, asynchronous copies, loads of 128 bits.

Needs nvcc (on the PATH, in $CUDA_HOME, or from the package nvidia-cuda-nvcc) and a disassembler (nvdisasm of
CUDA, of the package nvidia-cuda-nvdisasm, or of Triton's).

    python scripts/benchmarks/nvcc_gate.py [--architectures 80 90a] [--sources gemm.cu]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, Sheet, parser

SOURCE = ROOT / "kernels" / "cuda" / "source"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas", "-v")
INCLUDE = (f"-I{SOURCE}",)
MOST_REGISTERS = 168  # of a thread: three blocks of 128 threads fit on a multiprocessor
INSTRUCTIONS = {
    "HMMA": r"HMMA\.16816\.F32",
    "LDGSTS": r"LDGSTS\.\S*128",
    "LDG.128": r"LDG\.\S*128",
    "IDP": r"IDP\.4A",
    "LOP3": r"LOP3",
}
"""What is counted in the machine code: products of tensor cores, asynchronous copies and loads of 128 bits,
products of four int8, and functions of three words."""

EXPECTED: dict[str, tuple[str, ...]] = {
    "attend": ("LDG.128",),
    "multiply": ("HMMA", "LDG.128"),
    "multiply_many": ("HMMA", "LDGSTS"),
    "multiply_factors": ("HMMA",),
}
"""Instructions that every instance of a kernel must have."""


@dataclass
class Kernel:
    """One instance of a kernel, compiled for one architecture.

    Attributes:
        name: without its template arguments.
        instance: with them.
        registers: of a thread.
        spilled: bytes of registers that are stored to memory.
        shared: bytes of static shared memory.
        found: how often each of `INSTRUCTIONS` is in the code.
    """

    name: str
    instance: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    found: Counter[str] = field(default_factory=Counter)


def find_program(name: str, *more: Path) -> str | None:
    """A program of CUDA: on the PATH, where CUDA is installed, or in a package."""
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [Path("/usr/local/cuda/bin"), *sorted(packages.glob("nvidia/*/bin"), reverse=True), *more]
    found = [str(folder / name) for folder in folders if (folder / name).is_file()]
    return shutil.which(name) or next(iter(found), None)


def disassembler() -> str | None:
    """nvdisasm, or None."""
    return find_program("nvdisasm", Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin")


def run(*command: str) -> str:
    """What a program writes to both of its outputs.

    Raises:
        RuntimeError: it fails.
    """
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ended.stdout[-4000:]}")
    return ended.stdout


def readable(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> name with template arguments, without namespaces and parameters."""
    listed = list(symbols)
    demangled = run(shutil.which("c++filt") or "c++filt", *listed).splitlines() if listed else []
    names = {}
    for symbol, text in zip(listed, demangled, strict=True):
        text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
        depth, end = 0, len(text)
        for i, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        names[symbol] = re.sub(r"\b(\w+::)+", "", text[:end])
    return names


def compiled(nvcc: str, nvdisasm: str | None, source: Path, architecture: str) -> list[Kernel]:
    """All kernels of a source for one architecture.

    Args:
        nvcc: the compiler.
        nvdisasm: without one, instructions are not counted.
        source: a .cu file.
        architecture: such as 90a.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        log = run(nvcc, *FLAGS, f"-arch=sm_{architecture}", *INCLUDE, str(source), "-o", str(cubin))
        code = run(nvdisasm, "-c", str(cubin)) if nvdisasm else ""
    entries = re.split(r"Compiling entry function '", log)[1:]
    names = readable(entry.partition("'")[0] for entry in entries)
    kernels: dict[str, Kernel] = {}
    for entry in entries:
        symbol = entry.partition("'")[0]
        name = names[symbol]
        kernels[symbol] = Kernel(
            name=name.partition("<")[0],
            instance=name,
            registers=number(r"Used (\d+) registers", entry),
            spilled=number(r"(\d+) bytes spill stores", entry) + number(r"(\d+) bytes spill loads", entry),
            shared=number(r"(\d+) bytes smem", entry),
        )
    for part in re.split(r"^\.text\.", code, flags=re.M)[1:]:
        symbol = part.partition(":")[0]
        if symbol in kernels:
            for instruction, pattern in INSTRUCTIONS.items():
                kernels[symbol].found[instruction] = len(re.findall(rf"\b{pattern}", part))
    return list(kernels.values())


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def faults(kernels: Iterable[Kernel], disassembled: bool = True) -> list[str]:
    """What is wrong with kernels, a sentence each."""
    found = []
    for kernel in kernels:
        if kernel.spilled:
            found.append(f"{kernel.instance} spills {kernel.spilled} bytes")
        if kernel.registers > MOST_REGISTERS:
            found.append(f"{kernel.instance} has {kernel.registers} registers, above {MOST_REGISTERS}")
        for instruction in EXPECTED.get(kernel.name, ()) if disassembled else ():
            if not kernel.found[instruction]:
                found.append(f"{kernel.instance} has no {instruction}")
    return found


def row(kernels: dict[str, list[Kernel]]) -> dict[str, Any]:
    """The record of all instances of a kernel, by architecture."""
    instances = [kernel for found in kernels.values() for kernel in found]
    figures: dict[str, Any] = {
        f"sm_{architecture}": {"value": max(kernel.registers for kernel in found)}
        for architecture, found in kernels.items()
    }
    figures["instances"] = {"value": len(next(iter(kernels.values())))}
    figures["spilled"] = {"value": sum(kernel.spilled for kernel in instances)}
    figures["shared"] = {"value": max(kernel.shared for kernel in instances)}
    for instruction in INSTRUCTIONS:
        figures[instruction] = {"value": min(kernel.found[instruction] for kernel in instances)}
    return {"figures": figures}


def main() -> None:
    parsed = parser(__doc__, "nvcc-gate")
    parsed.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parsed.add_argument("--sources", nargs="+", default=sorted(file.name for file in SOURCE.glob("*.cu")))
    parsed.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parsed.set_defaults(results="nvcc_gate")
    arguments = parsed.parse_args()
    nvcc, nvdisasm = find_program("nvcc"), disassembler()
    if nvcc is None or nvdisasm is None:
        sys.exit(f"There is no {'nvcc' if nvcc is None else 'nvdisasm'}.")
    sheet, wrong = Sheet(arguments, like="nvcc_gate"), []
    for source in arguments.sources:
        compile_for = partial(compiled, nvcc, nvdisasm, SOURCE / source)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            made = pool.map(compile_for, arguments.architectures)
            found = dict(zip(arguments.architectures, made, strict=True))
        for architecture, kernels in found.items():
            wrong += [f"{source}, sm_{architecture}: {sentence}." for sentence in faults(kernels)]
        for name in sorted({kernel.name for kernels in found.values() for kernel in kernels}):
            of_name = {a: [kernel for kernel in all_of if kernel.name == name] for a, all_of in found.items()}
            sheet.row(f"{source}: {name}", partial(row, of_name))
    sheet.show()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
