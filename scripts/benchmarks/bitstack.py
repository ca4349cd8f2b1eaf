#!/usr/bin/env python
"""The randomised SVD that BitStack uses against full SVDs, on the demo model's own weights and inputs.

Both decompose the same linears of three layers, and after every block the residual norms are compared.

    python scripts/benchmarks/bitstack.py [--blocks 4] [--model demo] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from compress.anatomy import linears_by_input, weight
from compress.calibration.text.windows import calibration_windows
from compress.engine.stream import StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.quantization.bitstack import BitStack, ColumnNorms, low_rank
from compress.sources.find import find_model
from compress.storage.checkpoint import Checkpoint

RANK = BitStack.Options().rank

Factorise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def full(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = s[:RANK].sqrt()
    return u[:, :RANK] * roots, roots[:, None] * v[:RANK]


def residuals(matrix: torch.Tensor, blocks: int, factorise: Factorise) -> tuple[list[float], float]:
    """Norms of what each block leaves over, and the seconds that the factorisations took."""
    left, norms, seconds = matrix, [], 0.0
    for _ in range(blocks):
        started = time.perf_counter()
        a, b = factorise(left.abs())
        seconds += time.perf_counter() - started
        left = left - torch.where(left >= 0, 1.0, -1.0) * (a @ b)
        norms.append(float(left.double().norm()))
    return norms, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    folder = find_model(arguments.model).folder
    model = StreamedModel(Checkpoint.open(folder))
    windows = calibration_windows(load_tokenizer(folder), "bundled", nsamples=4, seqlen=256, seed=0)
    stream = model.stream(windows)
    chosen = {0, model.num_layers // 2, model.num_layers - 1}
    rows = []
    for layer in model.walk(None, stream):
        if layer.index not in chosen:
            stream.advance(layer)
            continue
        groups = linears_by_input(model.anatomy, layer.linears)
        norms = [ColumnNorms() for _ in groups]
        stream.advance(layer, {paths[0]: norm.add for paths, norm in zip(groups, norms, strict=True)})
        for paths, norm in zip(groups, norms, strict=True):
            for path in paths:
                matrix = weight(layer.linears[path]) * norm.scale
                generator = torch.Generator().manual_seed(0)
                ours, fast = residuals(matrix, arguments.blocks, lambda m, g=generator: low_rank(m, RANK, g))
                exact, slow = residuals(matrix, arguments.blocks, full)
                worst = max(a / b for a, b in zip(ours, exact, strict=True))
                name = f"{layer.index}.{path}"
                rows.append(
                    {
                        "linear": name,
                        "shape": list(matrix.shape),
                        "randomised": fast,
                        "full": slow,
                        "residual": worst,
                    }
                )
                if not arguments.json:
                    shape = "x".join(map(str, matrix.shape))
                    print(
                        f"{name:28} {shape:>10}  {fast:6.2f} s  {slow:6.2f} s  {slow / fast:5.1f} times  "
                        f"residual x {worst:.4f}",
                        flush=True,
                    )
    fast, slow = (sum(row[key] for row in rows) for key in ("randomised", "full"))
    worst = max(row["residual"] for row in rows)
    if arguments.json:
        print(json.dumps({"linears": rows, "speedup": slow / fast, "worst_residual": worst}, indent=2))
        return
    print(
        f"{len(rows)} linears, {arguments.blocks} blocks, rank {RANK}, {torch.get_num_threads()} threads: "
        f"randomised {fast:.1f} s, full {slow:.1f} s: {slow / fast:.1f} times faster; residual norms at most "
        f"{worst - 1:.2%} larger"
    )


if __name__ == "__main__":
    main()
