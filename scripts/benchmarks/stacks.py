"""Products with stacks straight from their bits, against rebuilding the weight: one row of activations.

Both run in one process, one after the other, through a pool of layers that is larger than the caches, with 1
and 2 threads. A row shows medians and their ratio, of which at least 2 is asked for.

    python scripts/benchmarks/stacks.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from common import Sheet, parser

from compress.kernels.cpu.library import kernel_name, use
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackBlock, StackedLinear

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
    options = parser(__doc__, "stacks")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--kernel", default="cpu", help="as for compress-model bench")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "stacks")
    kinds = (("nested", planes), ("BitStack", factors))
    for threads, shape, (kind, make), blocks in product(arguments.threads, SHAPES, kinds, BLOCKS):
        name = f"{kind}, {blocks} block{'s' * (blocks > 1)}, {shape[0]}x{shape[1]}"
        name += f", {threads} thread{'s' * (threads > 1)}"
        sheet.row(name, partial(figures, make, shape, blocks, threads, arguments.kernel))
    sheet.show()


def figures(
    make: Callable[[int, int, int], StackedLinear],
    shape: tuple[int, int],
    blocks: int,
    threads: int,
    kernel: str,
) -> dict[str, Any]:
    """What a row shows."""
    torch.set_num_threads(threads)
    seconds = measure(pool(make, shape, blocks), torch.bfloat16, (kernel, "reference"))
    use(kernel)
    fast, slow = seconds.values()
    found = {"bits": 1e6 * fast, "rebuilt": 1e6 * slow, "ratio": slow / fast}
    return {
        "figures": {key: {"value": value} for key, value in found.items()},
        "facts": {"kernel": kernel_name()},
    }


if __name__ == "__main__":
    main()
