#!/usr/bin/env python
"""Time the CPU kernels against the speed of reading, and against the kernels of others, in one process.

Every kernel multiplies with the weights of a pool that is larger than all caches, so each weight comes from
memory. The kernels of one shape, number of rows and number of threads take turns, and between them a loop
only reads. A row holds the median and the quartiles of the times, the share of the speed of reading at which
the bytes of the weight arrived, and the ratios to torch's int4 and bfloat16 products.

    python scripts/benchmarks/kernels.py [--shapes 4096x14336] [--rows 1] [--threads 2] [--seconds 20]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Sheet, parser

if TYPE_CHECKING:
    import torch

POOL = 256 << 20
GROUP = 128
TURN = 0.03  # seconds that a kernel runs before the next one takes its turn
BITS = (2, 3, 4, 5, 6, 8)
AVX2 = (4,)  # widths that are timed on the AVX2 path as well

READ = """
#include <cstdint>
#include <omp.h>
typedef int64_t Line __attribute__((vector_size(64)));
extern "C" int64_t read_all(const Line* lines, int64_t count) {
  int64_t total = 0;
#pragma omp parallel reduction(+ : total)
  {
    const int64_t share = count / omp_get_num_threads() / 4 * 4;
    const Line* from = lines + share * omp_get_thread_num();
    Line sums[4] = {};
    for (int64_t i = 0; i < share; i += 4)
      for (int j = 0; j < 4; j++) sums[j] += from[i + j];
    for (int j = 0; j < 4; j++)
      for (int lane = 0; lane < 8; lane++) total += sums[j][lane];
  }
  return total;
}
"""


class Kernel:
    """A product whose weights are taken from a pool, one after the other.

    Args:
        weights: the pool, in which all weights have the same size.
        multiply: called with one of them.
        path: which of our paths is in use meanwhile.
    """

    def __init__(
        self, weights: list[tuple[torch.Tensor, ...]], multiply: Callable[..., Any], path: str = "cpu"
    ) -> None:
        self.weights, self.multiply, self.path = weights, multiply, path
        self.nbytes = sum(tensor.nbytes for tensor in weights[0])
        self.times: list[float] = []
        self.next = count()

    def take_turn(self, seconds: float) -> None:
        from compress.kernels.cpu.library import use

        use(self.path)
        started, calls, took = time.perf_counter(), 0, 0.0
        while not calls or took < seconds:
            self.multiply(*self.weights[next(self.next) % len(self.weights)])
            calls, took = calls + 1, time.perf_counter() - started
        self.times.append(took / calls)


def pool(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Copies of the tensors of one weight, `POOL` bytes in all.

    They are parts of one allocation in large pages, as what the loop reads is.
    """
    import torch

    from compress.kernels.cpu.pages import into_large_pages

    copies = -(-POOL // sum(tensor.nbytes for tensor in tensors))
    repeated = [torch.stack([tensor] * copies) for tensor in tensors]
    into_large_pages(*repeated)
    return list(zip(*(tensor.unbind() for tensor in repeated), strict=True))


def ours(out: int, width: int, input: torch.Tensor) -> Iterator[tuple[str, Kernel]]:
    """Our kernels: asymmetric integers in groups, NF4, and FP8 with a scale for each row."""
    import torch

    from compress.kernels.cpu.layout import strip_bytes, strips_of
    from compress.kernels.cpu.library import paths
    from compress.kernels.ops import packed_linear

    def weight(bits: int, group: int, zeros: bool) -> list[torch.Tensor]:
        packed = torch.randint(0, 256, (strips_of(out), strip_bytes(width, bits, group)), dtype=torch.uint8)
        per_group = (strips_of(out), 1 if group == -1 else -(-width // group), 16)
        scales = (torch.rand(per_group) * 0.01).half()
        return [packed, scales, *([torch.full(per_group, 2 ** (bits - 1), dtype=torch.uint8)] * zeros)]

    for bits in BITS:
        weights = pool(*weight(bits, GROUP, True))
        for path, (name, activations) in product(
            ("cpu", "cpu:avx2"), (("A16", "floating"), ("A8", "int8-block"))
        ):
            if path == "cpu" or (bits in AVX2 and "avx2" in paths()):
                yield (
                    f"W{bits}{name}" + (" on AVX2" if path != "cpu" else ""),
                    Kernel(
                        weights,
                        lambda packed, scales, zeros, bits=bits, activations=activations: packed_linear(
                            input, packed, scales, zeros, None, None, bits, GROUP, out, activations
                        ),
                        path,
                    ),
                )
    nf4 = torch.linspace(-1, 1, 16) ** 3  # any 16 numbers that are not multiples of each other
    yield (
        "NF4",
        Kernel(
            pool(*weight(4, 64, False)),
            lambda packed, scales: packed_linear(input, packed, scales, None, nf4, None, 4, 64, out),
        ),
    )
    packed, scales = weight(8, -1, False)
    packed = (packed & 0xBF).view(torch.float8_e4m3fn)
    yield (
        "FP8",
        Kernel(
            pool(packed, scales),
            lambda packed, scales: packed_linear(input, packed, scales, None, None, None, 8, -1, out),
        ),
    )


def others(out: int, width: int, input: torch.Tensor) -> Iterator[tuple[str, Kernel]]:
    """The dense product, torch's int4 kernel, and that of bitsandbytes if it is installed."""
    import torch
    import torch.nn.functional as F

    dense = torch.randn(out, width).bfloat16()
    yield "bfloat16 linear", Kernel(pool(dense), lambda weight: F.linear(input, weight))
    codes = torch.randint(0, 16, (out, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.rand(width // GROUP, out, 2).bfloat16()
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    yield (
        "torch int4",
        Kernel(
            pool(packed, scales_and_zeros),
            lambda packed, scales_and_zeros: int4(input, packed, GROUP, scales_and_zeros),
        ),
    )
    with suppress(ImportError):
        import bitsandbytes.functional as bnb

        if len(input) == 1:  # for more rows it dequantizes and calls the dense product
            packed, state = bnb._convert_weight_packed_for_cpu(*bnb.quantize_4bit(dense, quant_type="nf4"))
            yield (
                "bitsandbytes NF4",
                Kernel(pool(packed), lambda packed: bnb.gemv_4bit(input, packed, state=state)),
            )


@cache
def reader() -> Callable[[int, int], int]:
    """A native function that only reads: the address and the number of lines of 64 bytes."""
    from compress.kernels.cpu.build import find_compiler

    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("There is no C++ compiler.")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.cpp"), Path(folder, "read.so")
        source.write_text(READ)
        flags = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
        subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    return function


@cache
def timed(shape: str, rows: int, threads: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The records of all kernels for one shape, number of rows and number of threads."""
    import torch

    from compress.kernels.cpu.pages import into_large_pages

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    out, width = map(int, shape.split("x"))
    input = torch.randn(rows, width).bfloat16()
    kernels = {**dict(others(out, width, input)), **dict(ours(out, width, input))}
    buffer = torch.ones(POOL, dtype=torch.uint8)
    into_large_pages(buffer)
    reading = []
    for kernel in kernels.values():
        kernel.take_turn(0)
        kernel.times.clear()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        reader()(buffer.data_ptr(), POOL // 64)
        reading.append(POOL / (time.perf_counter() - started))
        for kernel in kernels.values():
            kernel.take_turn(TURN)
    facts = {"shape": shape, "rows": str(rows), "threads": str(threads)}
    return {
        name: {"figures": figures(kernel, kernels, statistics.median(reading)), "facts": facts}
        for name, kernel in kernels.items()
    }


def figures(kernel: Kernel, kernels: dict[str, Kernel], reading: float) -> dict[str, Any]:
    """The time of one kernel, and its ratios to others."""
    low, median, high = statistics.quantiles(kernel.times, n=4, method="inclusive")
    ratios = {
        f"to_{key}": {"value": statistics.median(kernels[name].times) / median}
        for key, name in (("int4", "torch int4"), ("dense", "bfloat16 linear"))
    }
    return {
        "time": {
            "value": median,
            "low": low,
            "high": high,
            "unit": "seconds",
            "spread": "interquartile range",
        },
        "bandwidth": {"value": kernel.nbytes / median / 1e9},
        "of_reading": {"value": kernel.nbytes / median / reading, "unit": "fraction"},
        **ratios,
    }


def names(rows: int) -> list[str]:
    """The kernels that are timed for so many rows, in the order of the table."""
    integers = [f"W{bits}{activations}" for bits in BITS for activations in ("A16", "A8")]
    avx2 = [f"W{bits}{activations} on AVX2" for bits in AVX2 for activations in ("A16", "A8")]
    peers = ["bfloat16 linear", "torch int4", *(["bitsandbytes NF4"] if rows == 1 else [])]
    return [*peers, *integers, "NF4", "FP8", *avx2]


def counted(number: str, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {noun}" + ("" if number == "1" else "s")


def arguments_of() -> argparse.Namespace:
    options = parser(__doc__, "kernels")
    options.add_argument("--shapes", default="576x1536,2048x8192,4096x14336", help="out x in")
    options.add_argument("--rows", default="1,16,64", help="rows of activations")
    options.add_argument("--threads", default="1,2")
    options.add_argument("--seconds", type=float, default=20, help="for each shape, rows and threads")
    return options.parse_args()


def main() -> None:
    arguments = arguments_of()
    sheet = Sheet(arguments, "kernels")
    settings = [getattr(arguments, name).split(",") for name in ("shapes", "rows", "threads")]
    for shape, rows, threads in product(*settings):
        for kernel in names(int(rows)):
            sheet.row(
                f"{shape}, {counted(rows, 'row')}, {counted(threads, 'thread')}: {kernel}",
                lambda shape=shape, rows=rows, threads=threads, kernel=kernel: timed(
                    shape, int(rows), int(threads), arguments.seconds
                ).get(kernel, {}),
            )
        timed.cache_clear()  # the pools
    sheet.show()


if __name__ == "__main__":
    main()
