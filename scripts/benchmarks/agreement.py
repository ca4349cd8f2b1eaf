#!/usr/bin/env python
"""Compare the kernels with the reference: the divergence of what a packed model says through either.

The demo model is rounded to 4 bits and scored on Wikipedia, window by window, through the reference (plain
torch) and through the best native kernel, with inputs of 16 bits (not rounded below the model's dtype) and of
8. The last rows show what rounding inputs to 8 bits changes, whichever kernel does it.

    python scripts/benchmarks/agreement.py [--windows 8]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import Sheet, compressed, dense_model, parser

if TYPE_CHECKING:
    import torch

    from compress.engine.windows import Windows

STEP = {"method": "rtn", "bits": 4, "group_size": 64, "embedding_bits": 8}
CONTEXT = 512


class Way(NamedTuple):
    """A way to run the model."""

    kernel: str
    input_bits: int


class Pair(NamedTuple):
    """Two ways to run a model whose other weights and inputs have a dtype."""

    dtype: str
    expected: Way
    got: Way

    @property
    def name(self) -> str:
        ways = [f"{kernel}, {bits}-bit inputs" for kernel, bits in (self.expected, self.got)]
        return f"{self.dtype}: {' / '.join(ways)}"


PAIRS = [
    Pair(dtype, Way("reference", before), Way(kernel, after))
    for dtype in ("float32", "bfloat16")
    for before, kernel, after in ((16, "auto", 16), (8, "auto", 8), (16, "reference", 8))
]


def divergences(folder: Path, windows: Windows, pair: Pair) -> torch.Tensor:
    """KL(expected ‖ got) over the whole vocabulary, summed over a window's tokens: float64 [windows]."""
    import torch

    import compress

    def load(way: Way) -> Callable[[torch.Tensor], torch.Tensor]:
        model = compress.load(folder, dtype=pair.dtype, kernel=way.kernel, activation_bits=way.input_bits)
        return lambda tokens: model(tokens[None]).logits[0].double().log_softmax(-1)

    found = []
    expected, got = load(pair.expected), load(pair.got)
    with torch.inference_mode():
        for tokens in windows.tokens:
            p, q = expected(tokens), got(tokens)
            found.append((p.exp() * (p - q)).sum())
    return torch.stack(found)


def measured(folder: Path, windows: Windows, pair: Pair) -> dict[str, Any]:
    from compress.evaluation.statistics import mean_by_window

    sums = divergences(folder, windows, pair)
    kl = mean_by_window(sums.tolist(), [CONTEXT] * len(sums)).figure(lambda mean: mean, "nats/token")
    return {"steps": [STEP], "figures": {"kl": kl.model_dump(exclude_defaults=True)}}


def main() -> None:
    options = parser(__doc__, "agreement")
    options.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "agreement")
    from compress.calibration.text.windows import calibration_windows
    from compress.engine.tokenizer import load_tokenizer

    folder = sheet.folder / "int4"
    compressed(folder, dense_model(sheet.folder), [STEP])
    windows = calibration_windows(load_tokenizer(folder), "wikipedia", arguments.windows, CONTEXT, seed=0)
    for pair in PAIRS:
        sheet.row(pair.name, lambda pair=pair: measured(folder, windows, pair))
    sheet.show()


if __name__ == "__main__":
    main()
