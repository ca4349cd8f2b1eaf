#!/usr/bin/env python
"""Compare the randomised SVD that BitStack uses with full SVDs, on the demo model's own weights and inputs.

Both decompose the same linears of three layers; the residual norms are compared after every block.

    python scripts/benchmarks/bitstack.py [--blocks 4] [--model demo]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common import Sheet, parser

if TYPE_CHECKING:
    import torch

    Factorise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def full_svd(rank: int) -> Factorise:
    """A function that returns the best factors of this rank, from a full SVD."""
    import torch

    def factorise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        roots = s[:rank].sqrt()
        return u[:, :rank] * roots, roots[:, None] * v[:rank]

    return factorise


def randomised_svd(rank: int) -> Factorise:
    """The factorisation that BitStack uses, from one seed."""
    import torch

    from compress.quantization.bitstack import low_rank

    generator = torch.Generator().manual_seed(0)
    return lambda matrix: low_rank(matrix, rank, generator)


def residuals(matrix: torch.Tensor, blocks: int, factorise: Factorise) -> tuple[list[float], float]:
    """The norm that is left after each block, and the seconds that the factorisations took."""
    import torch

    left, norms, seconds = matrix, [], 0.0
    for _ in range(blocks):
        started = time.perf_counter()
        a, b = factorise(left.abs())
        seconds += time.perf_counter() - started
        left = left - torch.where(left >= 0, 1.0, -1.0) * (a @ b)
        norms.append(float(left.double().norm()))
    return norms, seconds


def matrices(source: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight scaled by its inputs) of every linear of the first, the middle and the last layer."""
    from compress.anatomy import linears_by_input, weight
    from compress.calibration.text.windows import calibration_windows
    from compress.engine.stream import StreamedModel
    from compress.engine.tokenizer import load_tokenizer
    from compress.quantization.bitstack import ColumnNorms
    from compress.sources.find import find_model
    from compress.storage.checkpoint import Checkpoint

    folder = find_model(source).folder
    model = StreamedModel(Checkpoint.open(folder))
    stream = model.stream(
        calibration_windows(load_tokenizer(folder), "bundled", nsamples=4, seqlen=256, seed=0)
    )
    chosen = {0, model.num_layers // 2, model.num_layers - 1}
    for layer in model.walk(None, stream):
        groups = linears_by_input(model.anatomy, layer.linears) if layer.index in chosen else []
        norms = [ColumnNorms() for _ in groups]
        stream.advance(layer, {paths[0]: norm.add for paths, norm in zip(groups, norms, strict=True)})
        for paths, norm in zip(groups, norms, strict=True):
            for path in paths:
                yield f"{layer.index}.{path}", weight(layer.linears[path]) * norm.scale


def measured(matrix: torch.Tensor, blocks: int, rank: int) -> dict[str, Any]:
    """Both decompositions of one matrix."""
    ours, fast = residuals(matrix, blocks, randomised_svd(rank))
    exact, slow = residuals(matrix, blocks, full_svd(rank))
    return {
        "steps": [{"method": "bitstack", "blocks": blocks, "rank": rank}],
        "figures": {
            "randomised_seconds": {"value": fast},
            "full_seconds": {"value": slow},
            "residual": {"value": max(a / b for a, b in zip(ours, exact, strict=True))},
        },
        "facts": {"shape": " x ".join(map(str, matrix.shape))},
    }


def arguments_of() -> argparse.Namespace:
    options = parser(__doc__, "bitstack")
    options.add_argument("--model", default="demo")
    options.add_argument("--blocks", type=int, default=4)
    return options.parse_args()


def main() -> None:
    arguments = arguments_of()
    sheet = Sheet(arguments, "bitstack")

    from compress.quantization.bitstack import BitStack

    rank = BitStack.Options().rank
    for name, matrix in matrices(arguments.model):
        sheet.row(name, lambda matrix=matrix: measured(matrix, arguments.blocks, rank))
    sheet.show()
    found = [row.figures for row in sheet.rows]
    fast, slow = (sum(row[key].value for row in found) for key in ("randomised_seconds", "full_seconds"))
    worst = max(row["residual"].value for row in found)
    print(
        f"{len(found)} linears, {arguments.blocks} blocks, rank {rank}: {slow / fast:.1f} times as fast; "
        f"residual norms at most {worst - 1:.2%} larger"
    )


if __name__ == "__main__":
    main()
