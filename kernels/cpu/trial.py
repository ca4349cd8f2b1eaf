"""Tries the native kernels of a path against plain torch, as ``compress-model doctor --build`` does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compress.errors import CompressError
from compress.kernels.cpu.layout import groups_of, groups_to_strips, to_strips
from compress.kernels.cpu.library import AUTO, CPU, use
from compress.kernels.ops import packed_linear
from compress.kernels.reference import ops as reference

OUT, WIDTH, GROUP_SIZE = 40, 200, 64
ROWS = (1, 4, 100)
"""Few rows and many go through different kernels."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def try_path(path: str) -> None:
    """Compile a path if that was not done, multiply small weights of every kind, and compare the results.

    Afterwards the process uses the kernel that it would take by itself.

    Raises:
        CompressError: it cannot be compiled or loaded, or its results are wrong.
    """
    use(f"{CPU}:{path}")
    try:
        for name, weight, dtype, rows in _cases():
            input = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)
            arguments = (input, *weight, GROUP_SIZE, OUT, "floating")
            expected = reference.packed_linear(*arguments).double()
            error = float((packed_linear(*arguments).double() - expected).norm() / expected.norm())
            if not error <= TOLERANCE[dtype]:
                raise CompressError(
                    f"The CPU kernels ({path}) multiply wrongly here ({name}, {dtype}, {rows} rows: an error "
                    f"of {error:.2g}); please report it, and use --kernel reference until then."
                )
    finally:
        use(AUTO)


def _cases() -> Iterator[tuple[str, tuple[Any, ...], torch.dtype, int]]:
    for name, weight in _weights():
        for dtype in TOLERANCE:
            for rows in ROWS:
                yield name, weight, dtype, rows


def _weights() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names and weights, as `packed_linear` takes them: codes, scales, zero points, table, bias, bits."""
    generator = torch.Generator().manual_seed(0)
    per_group = (OUT, groups_of(WIDTH, GROUP_SIZE))
    scales = groups_to_strips(torch.rand(per_group, generator=generator) + 0.5)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        codes = torch.randint(0, 2**bits, (OUT, WIDTH), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, per_group, generator=generator, dtype=torch.uint8)
        packed = to_strips(codes, bits, GROUP_SIZE)
        yield f"{bits} bits", (packed, scales, groups_to_strips(zeros), None, None, bits)
        if bits in (2, 4):
            table = torch.randn(2**bits, generator=generator)
            yield f"table of {bits} bits", (packed, scales, None, table, None, bits)
    floats = torch.randn(OUT, WIDTH, generator=generator).to(torch.float8_e4m3fn)
    yield "E4M3", (to_strips(floats, 8, GROUP_SIZE), scales, None, None, None, 8)
