#!/usr/bin/env python
"""Compare BlockPruner's search with the plain loop, on the demo model, in one process and on the same text.

The plain loop is the published one: the whole model is in memory, and for every block that is left, that
block is switched off and all windows go through the model. Our exact search with the published cost
(``cost: blocks``) must remove the same blocks at least 1.8 times as fast, or this exits with 1. Times are
wall clock; the processor time of all threads is beside them, because other programs on the machine disturb it
less.

    python scripts/benchmarks/blockpruner.py [--rounds 3] [--windows 4] [--tokens 256]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Sheet, parser
from torch import nn
from transformers import AutoModelForCausalLM

from compress.calibration.text.windows import calibration_windows
from compress.engine.stream import StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.method import StepContext
from compress.pruning.blockpruner import BlockPruner
from compress.sources.demo import demo_folder
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

WANTED = 1.8
Removals = list[tuple[int, str, float]]  # layer, "attention" or "mlp", perplexity without it


class Off(nn.Module):
    """Stands for a block that is switched off; costs nothing."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


@torch.inference_mode()
def plain_loop(model: Any, windows: Windows, rounds: int) -> Removals:
    """The published search on a Llama. All windows are one batch."""

    def perplexity() -> float:
        logits = model(windows.tokens, use_cache=False).logits[:, :-1]
        targets = windows.tokens[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        return math.exp(float(losses.double().view(len(windows), -1).mean()))

    left = [(layer, name) for layer in range(len(model.model.layers)) for name in ("self_attn", "mlp")]
    removed: Removals = []
    for _ in range(rounds):
        found = {}
        for index, name in left:
            layer = model.model.layers[index]
            block = getattr(layer, name)
            setattr(layer, name, Off(name == "self_attn"))
            found[index, name] = perplexity()
            setattr(layer, name, block)
        best = min(found, key=lambda block: found[block])
        left.remove(best)
        setattr(model.model.layers[best[0]], best[1], Off(best[1] == "self_attn"))
        removed.append((best[0], "attention" if best[1] == "self_attn" else "mlp", found[best]))
    return removed


class Clock(NamedTuple):
    """Seconds: of the wall clock, and of the processor over all threads of this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Clock:
        now = self.now()
        return Clock(now.wall - self.wall, now.processor - self.processor)


def ours(folder: Path, windows: Windows, **options: Any) -> tuple[Clock, list[dict[str, Any]]]:
    """The time it took, and what the result says of each removal."""
    with tempfile.TemporaryDirectory() as work:
        started = Clock.now()
        checkpoint = Checkpoint.open(folder)
        run = StepContext(Draft(checkpoint, Path(work)), windows, 0, Path(work), "cpu", lambda *_: None)
        found = BlockPruner().apply(StreamedModel(checkpoint), BlockPruner.Options(**options), run)
        return started.since(), found.details["removed"]


def search_row(
    took: Clock, windows: Windows, rounds: int, options: dict[str, Any], than: Clock | None = None
) -> dict[str, Any]:
    """One search as a row of the sheet; ``than`` is the time of the search it is compared with."""
    figures = {
        "windows": {"value": len(windows)},
        "rounds": {"value": rounds},
        "processor_seconds": {"value": took.processor},
    }
    if than is not None:
        figures["faster"] = {"value": than.wall / took.wall}
    calibration = {"source": "brown", "nsamples": len(windows), "seqlen": windows.tokens.shape[1], "seed": 0}
    steps = [{"method": "blockpruner", "blocks": rounds, **options}]
    return {"steps": steps, "calibration": calibration, "figures": figures, "seconds": took.wall}


def arguments_of() -> argparse.Namespace:
    options = parser(__doc__, "blockpruner")
    options.add_argument("--rounds", type=int, default=3, help="blocks to remove")
    options.add_argument("--windows", type=int, default=4, help="calibration windows of the exact search")
    options.add_argument("--tokens", type=int, default=256, help="tokens in such a window")
    return options.parse_args()


def exact_search(sheet: Sheet, folder: Path, windows: Windows, rounds: int) -> None:
    """The plain loop, then our exact search; exits with 1 if ours differs or is too slow."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(windows.tokens[:1])  # the first pass pays for what is made once
    started = Clock.now()
    expected = [(layer, part) for layer, part, _ in plain_loop(model, windows, rounds)]
    plain = started.since()
    del model
    options = {"cost": "blocks"}
    exact, removals = ours(folder, windows, blocks=rounds, **options)
    same = sum(pair == (found["layer"], found["part"]) for pair, found in zip(expected, removals))
    sheet.row("plain loop", lambda: search_row(plain, windows, rounds, {}))
    row = search_row(exact, windows, rounds, options, plain)
    row["figures"]["same"] = {"value": same}
    sheet.row("this project", lambda: row)
    if same < rounds:
        sheet.show()
        sys.exit("The removals differ from those of the plain loop.")
    if plain.wall / exact.wall < WANTED:
        sheet.show()
        sys.exit(f"The exact search is less than {WANTED} times as fast as the plain loop.")


def main() -> None:
    arguments = arguments_of()
    sheet = Sheet(arguments, "blockpruner")
    folder = demo_folder()
    tokenizer = load_tokenizer(folder)
    windows = calibration_windows(tokenizer, "brown", arguments.windows, arguments.tokens, seed=0)
    exact_search(sheet, folder, windows, arguments.rounds)
    sheet.show()


if __name__ == "__main__":
    main()
