#!/usr/bin/env python
"""Measure every default beside its alternatives, on the demo model.

Each group of rows changes one option and leaves everything else as it is. All results are scored on the same
windows of two texts: Wikipedia articles, and documents of Brown that no method was calibrated on.

    python scripts/benchmarks/defaults.py [--groups "grid" "calibration"] [--device cuda] [--jobs 2]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from common import Sheet, command, dense_model, lineage, parser, slug, write_recipe

BROWN = {"source": "brown", "seed": 0}
SAME = {**BROWN, "nsamples": 8, "seqlen": 512}
"""As many tokens as in the tables that compare the methods."""
TEXTS = {"wikipedia_512": "wikipedia", "brown_512": "brown:heldout"}
CONTEXT, WINDOWS = 512, 8  # tokens in a window, and windows, of each text
TABLE = {"embedding_bits": 8}
GRID = {"symmetric": False, **TABLE}


class Choice(NamedTuple):
    """A row: one value of the option in question. ``memory`` is the part of a stack that is read."""

    name: str
    step: dict[str, Any]
    calibration: dict[str, Any] = SAME
    memory: str | None = None


def grid() -> Iterator[Choice]:
    """Symmetric or asymmetric grids."""
    for method in ("rtn", "hqq", "awq", "gptq"):
        for bits in (4, 3):
            for symmetric in (True, False):
                step = {"method": method, "bits": bits, "symmetric": symmetric, **TABLE}
                yield Choice(f"{method}, {bits} bits, {'' if symmetric else 'a'}symmetric", step)


def feedback() -> Iterator[Choice]:
    """GPTQ as published, with clipped groups, with damping by the tokens of the text, and with both."""
    ways: dict[str, dict[str, Any]] = {
        "as published": {"clip": False, "damping": 0.01},
        "clipped": {"damping": 0.01},
        "damped by tokens": {"clip": False},
        "clipped, damped by tokens": {},
    }
    for bits in (4, 3, 2):
        for name, how in ways.items():
            yield Choice(f"gptq, {bits} bits, {name}", {"method": "gptq", "bits": bits, **GRID, **how})


def layout() -> Iterator[Choice]:
    """The layout of 2- and 3-bit files."""
    for bits in (2, 3):
        for form in ("gptq", "compressed-tensors"):
            step = {"method": "gptq", "bits": bits, "symmetric": False, "format": form}
            yield Choice(f"gptq, {bits} bits, {form}", step)


def rank() -> Iterator[Choice]:
    """The rank of ApiQ's adapters."""
    for bits in (4, 2):
        for rank in (4, 8, 16, 32, 64):
            step = {"method": "apiq", "bits": bits, "rank": rank, **GRID}
            yield Choice(f"apiq, {bits} bits, rank {rank}", step)


def saliency() -> Iterator[Choice]:
    """ApiQ with and without the saliency penalty."""
    for bits in (3, 2):
        for kind in (None, "before_lora", "after_lora"):
            step = {"method": "apiq", "bits": bits, "rank": 16, "saliency": kind or "none", **GRID}
            yield Choice(f"apiq, {bits} bits, saliency {kind}", step)


def blocks() -> Iterator[Choice]:
    """How many blocks BitStack writes."""
    for count in (4, 6, 8, 10, 12, 16):
        yield Choice(f"bitstack, {count} blocks", {"method": "bitstack", "blocks": count, **TABLE})


def order() -> Iterator[Choice]:
    """BitStack's two ways to order blocks, read at the sizes of 2, 3 and 4 bits.

    The order by perplexity takes hundreds of passes a level, so both have four windows to find it with.
    """
    for importance in ("gradient", "perplexity"):
        step = {"method": "bitstack", "blocks": 8, "importance": importance, "order_windows": 4, **TABLE}
        for memory in ("60MB", "73.5MB", "86.9MB"):
            yield Choice(f"bitstack, {importance} order, {memory}", step, SAME, memory)


def cost() -> Iterator[Choice]:
    """BlockPruner's criterion, with as many tokens as the other methods have."""
    for ratio in (0.1, 0.2, 0.3):
        for cost in ("blocks", "parameters"):
            step = {"method": "blockpruner", "ratio": ratio, "cost": cost}
            yield Choice(f"blockpruner, {ratio:.0%}, by {cost}", step)


def transform() -> Iterator[Choice]:
    """ReplaceMe's linear maps."""
    for count in (3, 5, 6, 9):
        for kind in ("least-squares", "cosine", "none"):
            step = {"method": "replaceme", "layers": count, "transform": kind, "held_out": 0.0}
            yield Choice(f"replaceme, {count} layers, {kind}", step)


def maps() -> Iterator[Choice]:
    """ReplaceMe with one map or several."""
    for count, numbers in ((6, (1, 2, 3, 6)), (4, (1, 2, 4))):
        for number in numbers:
            for kind in ("least-squares", "cosine"):
                step = {"method": "replaceme", "layers": count, "transforms": number, "transform": kind}
                yield Choice(f"replaceme, {count} layers, {number} maps, {kind}", step)


def heads() -> Iterator[Choice]:
    """K-prune with and without a head left in every layer."""
    for ratio in (0.1, 0.2, 0.3):
        for count in (0, 1):
            step = {"method": "kprune", "ratio": ratio, "min_heads": count}
            yield Choice(f"kprune, {ratio:.0%}, min_heads {count}", step)


def training() -> Iterator[Choice]:
    """LLM-QAT's learning rate and batch, on text that the model wrote itself."""
    text = {"source": "generate", "nsamples": 240, "seqlen": 128, "seed": 0}
    for batch in (1, 4, 8):
        for rate in (1e-4, 3e-4, 1e-3):
            step = {"method": "llm-qat", "batch_size": batch, "learning_rate": rate, "epochs": 1, **TABLE}
            yield Choice(f"llm-qat, batch {batch}, rate {rate:g}", step, text)


def calibration() -> Iterator[Choice]:
    """How much calibration text a method needs."""
    steps: dict[str, dict[str, Any]] = {
        "awq": {"method": "awq", "bits": 4, **GRID},
        "gptq": {"method": "gptq", "bits": 4, **GRID},
        "nested": {"method": "nested", "bits": 4, **TABLE},
        "bitstack": {"method": "bitstack", "blocks": 6, **TABLE},
        "apiq": {"method": "apiq", "bits": 4, "rank": 16, **GRID},
        "flap": {"method": "flap", "ratio": 0.2},
        "wanda-sp": {"method": "wanda-sp", "ratio": 0.1},
        "kprune": {"method": "kprune", "ratio": 0.2},
        "replaceme": {"method": "replaceme", "layers": 5},
        "shortgpt": {"method": "shortgpt", "layers": 5},
        "blockpruner": {"method": "blockpruner", "ratio": 0.2, "cost": "parameters"},
    }
    for name, step in steps.items():
        for nsamples, seqlen in ((8, 128), (8, 512), (32, 512), (128, 512), (32, 2048), (128, 2048)):
            text = {**BROWN, "nsamples": nsamples, "seqlen": seqlen}
            yield Choice(f"{name}, {nsamples} x {seqlen}", step, text)


def formats() -> Iterator[Choice]:
    """Rounding to floating-point formats and to 8-bit integers."""
    for kind in ("fp8", "mxfp4", "nvfp4"):
        yield Choice(f"float, {kind}", {"method": "float", "type": kind})
    yield Choice("llm-int8", {"method": "llm-int8"})
    yield Choice("nf4", {"method": "nf4"})


GROUPS = {
    group.__name__: group
    for group in (
        *(grid, feedback, layout, rank, saliency, blocks, order, cost, transform, maps, heads, training),
        *(calibration, formats),
    )
}


class Bench:
    """Makes and scores one row at a time, with its files in ``folder``."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.dense = dense_model(folder)
        self.locks: defaultdict[Path, Lock] = defaultdict(Lock)

    def measured(self, choice: Choice) -> dict[str, Any]:
        output = self.folder / slug(json.dumps([choice.step, choice.calibration]))[:200]
        with self.locks[output]:  # rows that read different parts of one result make it once
            made = self.made(output, choice)
        return {
            "steps": [choice.step],
            "calibration": choice.calibration,
            "figures": self.figures(output, choice.memory),
            "facts": {"device": self.device},
            "seconds": made["steps"][0]["seconds"],
            "peak_memory_bytes": made["steps"][0]["peak_memory_bytes"],
        }

    def made(self, output: Path, choice: Choice) -> dict[str, Any]:
        """The lineage of the row's model, which is made if it is not there yet."""
        if not (output / "compression.json").exists():
            file = output.with_name(f"{output.name}.yaml")
            recipe = write_recipe(file, self.dense, [choice.step], choice.calibration)
            command("run", recipe, "-o", output, "--device", self.device, "--quiet")
        return lineage(output)

    def figures(self, output: Path, memory: str | None) -> dict[str, Any]:
        """The size of a model, and its perplexity and divergence on both texts."""
        from compress.engine.opening import open_checkpoint
        from compress.evaluation.evaluate import compare_streams
        from compress.storage.formats.stacks import prefix, steps_within
        from compress.system.memory import parse_memory

        model = open_checkpoint(output)
        size = sum(Path(file).stat().st_size for file in {item.file for item in model.sources.values()})
        if memory is not None:
            model = prefix(model, steps_within(model, parse_memory(memory)))
            size = model.nbytes
        found: dict[str, Any] = {"size": {"value": size, "unit": "bytes"}}
        for key, text in TEXTS.items():
            dense = open_checkpoint(self.dense)
            scored = compare_streams(dense, model, self.windows(text), self.device).fidelity()
            found[f"{key}.perplexity"] = scored.perplexity.model_dump(mode="json")
            found[f"{key}.kl"] = scored.kl_mean.model_dump(mode="json")
        return found

    @cache  # noqa: B019 - there is one bench
    def windows(self, text: str) -> Any:
        """What is scored of a text."""
        from compress.calibration.text.windows import evaluation_windows
        from compress.engine.tokenizer import load_tokenizer

        return evaluation_windows(load_tokenizer(self.dense), text, CONTEXT, WINDOWS)


def main() -> None:
    options = parser(__doc__, "defaults")
    options.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    options.add_argument("--device", default="cpu")
    options.add_argument("--jobs", type=int, default=1, help="rows measured at the same time")
    options.add_argument("--like", default="", help="only rows whose name contains this")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "quantization")
    bench = Bench(sheet.folder, arguments.device)
    choices = [row for name in arguments.groups for row in GROUPS[name]() if arguments.like in row.name]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for choice, record in zip(choices, pool.map(lambda choice: measured(bench, choice), choices)):
            if record is not None:
                sheet.row(choice.name, lambda record=record: record)
    sheet.show()


def measured(bench: Bench, choice: Choice) -> dict[str, Any] | None:
    """The row, or None (with the reason on stderr) where it cannot be measured."""
    try:
        return bench.measured(choice)
    except Exception as error:
        print(f"{choice.name}: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    main()
