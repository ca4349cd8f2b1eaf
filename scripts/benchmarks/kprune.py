#!/usr/bin/env python
"""Compare K-prune with parts of it and with magnitude pruning, on a fine-tuned MiniLM.

Each method removes 40, 60 and 80 % of the FLOPs of the layers.

The model tells sarcastic headlines; scripts/data/make_sarcasm_model.py makes it if it is not in the cache.
All methods see the same headlines without labels and are scored on the same labelled ones, each in a process
of its own through the command line. FLOPs are those of the layers on an input of mean length. Magnitude
pruning counts parameters, so its ratio is searched until its FLOPs are the same.

    python scripts/benchmarks/kprune.py [--ratios 0.4 0.6 0.8] [--methods kprune magnitude]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Sheet, command, compressed, evaluated, lineage, parser, slug, write_recipe

MAKE = Path(__file__).parents[1] / "data" / "make_sarcasm_model.py"

METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    "kprune": lambda ratio: {"method": "kprune", "ratio": ratio},
    "kprune, min_heads 1": lambda ratio: {"method": "kprune", "ratio": ratio, "min_heads": 1},
    "kprune, masks only": lambda ratio: {"method": "kprune", "ratio": ratio, "tune": False},
    "magnitude": lambda ratio: {"method": "magnitude", "ratio": ratio},
}
BY_PARAMETERS = ("magnitude",)  # methods whose ratio is not a share of FLOPs
TOLERANCE = 0.005  # of the share of FLOPs that is wanted
TRIES = 12


def layer_flops(folder: Path, tokens: int) -> int:
    """The FLOPs of the layers on one input of ``tokens``."""
    from compress.engine.config import config_of
    from compress.engine.flops import flops
    from compress.storage.checkpoint import Checkpoint

    return flops(config_of(Checkpoint.open(folder)), tokens).layers


def matched(removed: Callable[[float], float], wanted: float) -> float:
    """The ratio at which ``removed``, which rises with it, is ``wanted`` within TOLERANCE, by bisection.

    Widths are whole numbers, so that may be impossible; then the nearest of the ratios tried is returned.
    """
    low, high, ratio = 0.0, 1.0, wanted
    tried: dict[float, float] = {}
    for _ in range(TRIES):
        tried[ratio] = removed(ratio)
        if abs(tried[ratio] - wanted) <= TOLERANCE:
            break
        low, high = (ratio, high) if tried[ratio] < wanted else (low, ratio)
        ratio = (low + high) / 2
    return min(tried, key=lambda ratio: abs(tried[ratio] - wanted))


class Bench:
    """The dense model, its score, and a folder where everything lies."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder = folder
        made = subprocess.run([sys.executable, MAKE], check=True, stdout=subprocess.PIPE, text=True)
        self.dense = Path(made.stdout.strip())
        self.test = self.dense / "test.jsonl"
        source = str(self.dense / "calibration.jsonl")
        self.calibration = {"source": source, "nsamples": samples, "seqlen": 128, "seed": 0}
        card = folder / "dense.scorecard.json"
        if not card.exists():
            command("evaluate", self.dense, "--task-file", self.test, "--json", card)
        self.card = evaluated(folder / "dense", self.dense)[0]
        self.tokens = self.card["task_protocol"]["mean_tokens"]

    def removed(self, model: Path) -> float:
        """The share of the layers' FLOPs that is gone."""
        return 1 - layer_flops(model, self.tokens) / layer_flops(self.dense, self.tokens)

    def ratio(self, name: str, wanted: float) -> float:
        """The ratio to ask of ``name``, so that this share of FLOPs goes."""
        if name not in BY_PARAMETERS:
            return wanted
        trial = self.folder / f"{slug(name)}-{wanted:g}-trial"

        def removed(ratio: float) -> float:
            recipe = trial.with_name(f"{trial.name}.yaml")
            write_recipe(recipe, self.dense, [METHODS[name](ratio)], self.calibration)
            command("run", recipe, "-o", trial, "--overwrite")
            return self.removed(trial)

        return matched(removed, wanted)

    def figures(self, card: dict[str, Any]) -> dict[str, Any]:
        """The figures of a scorecard that the table shows."""
        from compress.report.scorecard import Measurement

        task, measured = card["task"], Measurement.model_validate(card["cost"]["measured"])
        found = {
            "flops_ratio": {"value": task["flops"]["value"] / self.card["task"]["flops"]["value"]},
            "accuracy": task["accuracy"],
            "agreement": task["agreement"],
            "mcnemar_p": task["mcnemar_p"],
            "latency": measured.latency.model_dump(),
        }
        return {key: figure for key, figure in found.items() if figure is not None}

    def measured(self, name: str, wanted: float) -> dict[str, Any]:
        """One method at one share of FLOPs to remove."""
        output = self.folder / f"{slug(name)}-{wanted:g}"
        known = (output / "compression.json").exists()
        step = METHODS[name](wanted if known else self.ratio(name, wanted))
        compressed(output, self.dense, [step], self.calibration)
        card = evaluated(output, self.dense, "--task-file", self.test)[-1]
        done = lineage(output)["steps"][0]
        gone = {"value": self.removed(output), "unit": "fraction"}
        return {
            "steps": [{**step, "ratio": done["options"]["ratio"]}],
            "calibration": {**self.calibration, "source": "calibration.jsonl"},
            "figures": {"layer_flops_removed": gone, **self.figures(card)},
            "seconds": done["seconds"],
            "peak_memory_bytes": done["peak_memory_bytes"],
        }


def main() -> None:
    options = parser(__doc__, "kprune")
    options.add_argument(
        "--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.8], help="shares of FLOPs to remove"
    )
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--samples", type=int, default=512, help="headlines to calibrate on")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "kprune")
    bench = Bench(sheet.folder, arguments.samples)
    sheet.row("dense", lambda: {"figures": bench.figures(bench.card)})
    for ratio in arguments.ratios:
        for name in arguments.methods:
            sheet.row(f"{name}, {ratio * 100:g} %", lambda n=name, r=ratio: bench.measured(n, r))
    sheet.show()


if __name__ == "__main__":
    main()
