"""Products with stacks straight from their bits, against rebuilding the weight: one row of activations.

Both run in one process, one after the other, through a pool of layers that is larger than the caches, with 1
and 2 threads. A row shows medians and their ratio, of which at least 2 is asked for.

    python scripts/benchmarks/stacks.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from common import stamp
from records import FOLDER, Record, Results

from compress.kernels.cpu.library import kernel_name, use
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackBlock, StackedLinear
from compress.report.scorecard import Figure

SHAPES = [(2048, 8192), (4096, 4096)]
BLOCKS = range(1, 5)
POOL = 64 << 20
REPEATS = 7


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 8), dtype=torch.uint8)


def planes(out: int, width: int, blocks: int) -> StackedLinear:
    first = {"signs": signs(2, out, width), "scales": (torch.rand(out, width // 128) + 0.5).half()}
    more = [StackBlock({"signs": signs(out, width)}) for _ in range(blocks - 1)]
    return PlaneStack(width, out, [StackBlock(first), *more])


def factors(out: int, width: int, blocks: int) -> StackedLinear:
    parts = [
        {
            "signs": signs(out, width),
            "left": torch.randn(out, 16).half(),
            "right": torch.randn(16, width).half(),
        }
        for _ in range(blocks)
    ]
    return FactorStack(width, out, [StackBlock(part) for part in parts])


def pool(
    make: Callable[[int, int, int], StackedLinear], shape: tuple[int, int], blocks: int
) -> list[StackedLinear]:
    """Equal layers, of other memory each, that are larger than the caches together."""
    one = make(*shape, blocks)
    return [one, *(make(*shape, blocks) for _ in range(POOL // one.weight_bytes))]


@torch.inference_mode()
def measure(layers: list[StackedLinear], dtype: torch.dtype, kernels: tuple[str, ...]) -> dict[str, float]:
    """Kernel -> median seconds of a product with one row."""
    x, seconds = torch.randn(1, layers[0].in_features, dtype=dtype), {kernel: [] for kernel in kernels}
    turns = cycle(layers)
    for repeat in range(REPEATS + 1):
        for kernel in kernels:
            use(kernel)
            layer, start = next(turns), time.perf_counter()
            layer(x)
            if repeat:
                seconds[kernel].append(time.perf_counter() - start)
    return {kernel: statistics.median(times) for kernel, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernel", default="cpu", help="as for compress-model bench")
    arguments = parser.parse_args()
    results = Results.read(FOLDER / "stacks.json")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for kind, make in (("nested", planes), ("BitStack", factors)):
                for blocks in BLOCKS:
                    found = measure(
                        pool(make, shape, blocks), torch.bfloat16, (arguments.kernel, "reference")
                    )
                    use(arguments.kernel)
                    record = row(f"{kind}, {blocks} block{'s' * (blocks > 1)}", shape, threads, found)
                    print(
                        record.name, {key: round(figure.value, 1) for key, figure in record.figures.items()}
                    )
                    results.put(record)
                    results.write(FOLDER / "stacks.json")


def row(name: str, shape: tuple[int, int], threads: int, seconds: dict[str, float]) -> Record:
    fast, slow = seconds.values()
    figures = {
        "bits": Figure(value=1e6 * fast),
        "rebuilt": Figure(value=1e6 * slow),
        "ratio": Figure(value=slow / fast),
    }
    return Record(
        name=f"{name}, {shape[0]}x{shape[1]}, {threads} thread{'s' * (threads > 1)}",
        figures=figures,
        facts={"kernel": kernel_name()},
        **stamp(),
    )


if __name__ == "__main__":
    main()
