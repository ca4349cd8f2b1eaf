"""Compiles the Triton programs ahead of time, without a GPU, and prints what came out as JSON.

    python ahead.py CAPABILITY [CAPABILITY ...]

CAPABILITY is one as 90 for 9.0. Triton's cuobjdump says how many registers a thread has, and how many bytes
of memory it takes for those that do not fit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels.triton import programs
from compress.kernels.triton.linear import LOOKED_UP, OPTIONS, TILE_OUT, columns_of_tile, rows_of_tile

USUAL = {"x": "*bf16", "numbers": "*i64", "packed": "*i32", "scales": "*fp16", "output": "*fp32"}
ALIGNED = [["tt.divisibility", 16]]
BYTES = {"scales": "*u8", "scale_table": "*fp32"}
LINEAR: dict[str, tuple[dict[str, str], int, int, int]] = {
    # name -> types of arguments besides the usual ones, bits, columns that share a scale, rows of the input
    "4 bits, one row": ({"zeros": "*u8"}, 4, 128, 1),
    "3 bits, 64 rows": ({}, 3, 128, 64),
    "nvfp4, one row": ({**BYTES, "table": "*fp32"}, 4, 16, 1),
}
RESOURCES = {"registers": "REG", "spilled": "STACK"}
INSTRUCTIONS = {"tensor cores": "mma.sync|wgmma.mma|tcgen05.mma", "asynchronous copies": "cp.async.c[ag]"}


def compiled(program: Any, types: dict[str, str], constants: dict[str, Any], target: int) -> dict[str, int]:
    names, pointers = program.arg_names, USUAL | types
    absent = dict.fromkeys({"scale_table", "zeros", "table"} & set(names) - set(types))
    constants = {**constants, **absent}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): ALIGNED for name in (*pointers, "width", "words") if name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(program, signature, fixed, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=OPTIONS)
    found = {what: len(re.findall(pattern, kernel.asm["ptx"])) for what, pattern in INSTRUCTIONS.items()}
    return {**found, **resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread of a kernel takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ended = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {what: int(*re.findall(rf"{key}:(\d+)", ended.stdout)) for what, key in RESOURCES.items()}


if __name__ == "__main__":
    made = {}
    for capability in map(int, sys.argv[1:]):
        for name, (types, bits, group, rows) in LINEAR.items():
            tile = {
                "tile_rows": rows_of_tile(rows),
                "tile_out": TILE_OUT,
                "columns": columns_of_tile(group, 4096),
            }
            made[f"linear, {name}, {capability}"] = compiled(
                programs.linear, types, {"bits": bits, **tile}, capability
            )
        table = {"bits": 5, "columns": LOOKED_UP}
        made[f"embedding, {capability}"] = compiled(programs.embedding, {}, table, capability)
    print(json.dumps(made))
