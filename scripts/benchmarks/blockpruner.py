#!/usr/bin/env python
"""BlockPruner's search against the plain loop, on the demo model, in one process and with the same text.

The plain loop is the published one: the whole model in memory, a forward pass over all windows for every
block that is left, with that block switched off, and the cross-entropy of float32 logits. Ours must remove
the same blocks at least 1.8 times as fast, or this exits with 1. Racing is compared with our exact search, on
more and shorter windows, which it needs to drop anything. Times are wall clock; the processor time of all
threads stands beside them, which other programs on the machine disturb less.

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


def report(what: str, took: Clock, than: Clock | None = None) -> None:
    faster = f"   {than.wall / took.wall:.2f} ({than.processor / took.processor:.2f})" if than else ""
    times = " times as fast" if than else ""
    print(f"{what:<14}{took.wall:>8.1f} s ({took.processor:.1f} s){faster}{times}", flush=True)


def ours(folder: Path, windows: Windows, **options: Any) -> tuple[Clock, list[dict[str, Any]]]:
    """The time it took, and what the result says of each removal."""
    with tempfile.TemporaryDirectory() as work:
        started = Clock.now()
        checkpoint = Checkpoint.open(folder)
        run = StepContext(Draft(checkpoint, Path(work)), windows, 0, Path(work), "cpu", lambda *_: None)
        found = BlockPruner().apply(StreamedModel(checkpoint), BlockPruner.Options(**options), run)
        return started.since(), found.details["removed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="blocks to remove")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of the exact search")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in such a window")
    parser.add_argument(
        "--race-windows", type=int, default=32, help="calibration windows of the race; 0: none"
    )
    parser.add_argument("--race-tokens", type=int, default=64, help="tokens in such a window")
    parser.add_argument("--race-rounds", type=int, default=2, help="blocks to remove in the race")
    arguments = parser.parse_args()
    folder = demo_folder()
    tokenizer = load_tokenizer(folder)

    windows = calibration_windows(tokenizer, "brown", arguments.windows, arguments.tokens, seed=0)
    print(f"{len(windows)} windows of {arguments.tokens} tokens of Brown, {arguments.rounds} rounds")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(windows.tokens[:1])  # the first pass pays for what is made once
    started = Clock.now()
    expected = plain_loop(model, windows, arguments.rounds)
    plain = started.since()
    del model
    report("plain loop", plain)
    exact, removals = ours(folder, windows, blocks=arguments.rounds)
    report("exact search", exact, plain)
    for (layer, part, perplexity), removal in zip(expected, removals, strict=True):
        print(
            f"  {part} {layer}: perplexity {perplexity:.4f}; "
            f"ours {removal['part']} {removal['layer']}: {removal['perplexity']:.4f}"
        )
    same = [(layer, part) for layer, part, _ in expected] == [
        (removal["layer"], removal["part"]) for removal in removals
    ]

    if arguments.race_windows:
        windows = calibration_windows(
            tokenizer, "brown", arguments.race_windows, arguments.race_tokens, seed=0
        )
        print(f"\n{len(windows)} windows of {arguments.race_tokens} tokens, {arguments.race_rounds} rounds")
        whole, wanted = ours(folder, windows, blocks=arguments.race_rounds)
        report("exact search", whole)
        raced, found = ours(folder, windows, blocks=arguments.race_rounds, search="racing")
        report("racing", raced, whole)
        saved = 1 - sum(r["evaluated"] for r in found) / sum(r["pairs"] for r in found)
        agree = sum((a["layer"], a["part"]) == (b["layer"], b["part"]) for a, b in zip(wanted, found))
        print(f"  {agree} of {len(wanted)} removals as in the exact search")
        print(f"  {saved:.0%} of the pairs of block and window not evaluated")

    if not same:
        sys.exit("The removals differ from those of the plain loop.")
    if plain.wall / exact.wall < WANTED:
        sys.exit(f"The exact search is less than {WANTED} times as fast as the plain loop.")


if __name__ == "__main__":
    main()
