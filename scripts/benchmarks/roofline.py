#!/usr/bin/env python
"""How long a product with packed weights takes at best on a GPU: on paper, from bytes and data sheets.

A product cannot be faster than memory delivers its weight, scales, zero points, input and output, nor than
tensor cores multiply. The longer of the two times is what is shown, beside that of the dense product in
bfloat16, and beside figures that the authors of other kernels have published. Nothing is measured here;
`gpu.py` measures, on the day there is a GPU, and divides by the same bytes.

    python scripts/benchmarks/roofline.py
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from common import Sheet, parser

ROWS = (1, 16, 64)
SHAPES = ((4096, 14336), (4096, 4096), (2048, 2048), (8192, 28672))
BITS = (4, 2)
GROUP = 128


@dataclass(frozen=True)
class Gpu:
    """What the maker's data sheet says.

    Attributes:
        name: of the model.
        bandwidth: of its memory, bytes/s.
        half: products of 16-bit numbers summed up in float32 by tensor cores, without sparsity, FLOP/s.
    """

    name: str
    bandwidth: float
    half: float


GPUS = (
    Gpu("A100 80 GB SXM", 2.039e12, 312e12),
    Gpu("H100 SXM", 3.35e12, 989e12),
    Gpu("RTX 4090", 1.008e12, 165.2e12),
)


@dataclass(frozen=True)
class Layout:
    """What a packed weight consists of.

    Attributes:
        bits: of a code.
        group: columns that share a scale; −1 for a row.
        scale: bytes of a scale.
        zero: bytes of a zero point; 0 if they are not stored.
    """

    bits: int
    group: int = GROUP
    scale: int = 2
    zero: int = 0

    def weight_bytes(self, out: int, width: int) -> int:
        """The bytes of a weight [out, width] with whole words in a row."""
        groups = 1 if self.group == -1 else -(-width // self.group)
        return out * (-(-width * self.bits // 32) * 4 + groups * (self.scale + self.zero))


DENSE = Layout(16, -1, 0)
"""A weight in bfloat16."""


def moved_bytes(weight: int, out: int, width: int, rows: int) -> int:
    """The least that memory moves for a product: a weight of so many bytes, 16-bit input and output."""
    return weight + 2 * rows * (out + width)


def least_seconds(gpu: Gpu, layout: Layout, out: int, width: int, rows: int) -> tuple[float, str]:
    """The least time of a product [rows, width] · [out, width]ᵀ, and what sets it: memory or tensor cores."""
    memory = moved_bytes(layout.weight_bytes(out, width), out, width, rows) / gpu.bandwidth
    compute = 2 * rows * out * width / gpu.half
    return max((memory, "memory"), (compute, "tensor cores"))


def on_paper(gpu: Gpu, bits: int, out: int, width: int) -> dict[str, Any]:
    """One row: times in µs, and how many times as fast as the dense product."""
    figures, limits = {}, {}
    for rows in ROWS:
        seconds, limits[rows] = least_seconds(gpu, Layout(bits), out, width, rows)
        dense, _ = least_seconds(gpu, DENSE, out, width, rows)
        figures[f"time_{rows}"] = {"value": 1e6 * seconds}
        figures[f"ratio_{rows}"] = {"value": dense / seconds}
    return {"figures": figures, "facts": {"limit": limits[ROWS[-1]]}}


@dataclass(frozen=True)
class Published:
    """What the authors of a kernel say it reaches, and what the same arithmetic gives.

    Attributes:
        what: the kernel and what was timed.
        where: the GPU.
        source: where they say so.
        said: times as fast as 16 bits.
        bytes_: what is read for a product or a token.
        dense: the same with 16-bit weights.
    """

    what: str
    where: str
    source: str
    said: float
    bytes_: float
    dense: float

    def row(self) -> dict[str, Any]:
        paper = self.dense / self.bytes_
        facts = {"where": self.where, "source": self.source}
        figures: dict[str, Any] = {"said": {"value": self.said}, "paper": {"value": paper}}
        return {
            "facts": facts,
            "figures": figures | {"share": {"value": self.said / paper, "unit": "fraction"}},
        }


LAYER = 4096 * 14336
# Llama 2 7B: 32 layers of four linears 4096 x 4096 and three 11008 x 4096, and a head of 32000 x 4096.
LINEARS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
HEAD = 2 * 32000 * 4096
PUBLISHED = (
    Published(
        "Marlin: a product, 4 bits in groups of 128, 1 to 16 rows",
        "A10",
        "its README",
        3.87,
        Layout(4).weight_bytes(4096, 14336),
        2 * LAYER,
    ),
    Published(
        "QTIP: tokens per second of Llama 2 7B, 2 bits, 1 row",
        "RTX 6000 Ada",
        "its paper: 188 and 55.9",
        188 / 55.9,
        LINEARS / 4 + HEAD,
        LINEARS * 2 + HEAD,
    ),
)


def main() -> None:
    options = parser(__doc__, "roofline")
    options.set_defaults(results="gpu_on_paper")
    arguments = options.parse_args()
    sheet = Sheet(arguments, like="gpu_on_paper")
    for gpu in GPUS:
        for out, width in SHAPES:
            for bits in BITS:
                name = f"{gpu.name}: {out}x{width}, {bits} bits"
                sheet.row(name, partial(on_paper, gpu, bits, out, width))
    for published in PUBLISHED:
        sheet.row(published.what, published.row)
    sheet.show()


if __name__ == "__main__":
    main()
