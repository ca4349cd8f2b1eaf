#!/usr/bin/env python
"""K-prune on a fine-tuned MiniLM at 40, 60 and 80 % fewer FLOPs, beside masks without weight tuning and
beside magnitude pruning, in one table.

The model tells sarcastic headlines; scripts/data/make_sarcasm_model.py makes it if it is not in the cache.
All methods see the same headlines without labels, all are scored on the same labelled ones, each in a process
of its own through the command line. FLOPs are those of the layers on an input of mean length. Magnitude
pruning counts parameters, so its ratio is searched until its FLOPs are the same.

    python scripts/benchmarks/kprune.py [--ratios 0.4 0.6 0.8] [--methods kprune magnitude] [--folder FOLDER]

What is in the folder already is not done again, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from compress.report.scorecard import Scorecard

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

HEADINGS = (
    "method",
    "fewer FLOPs wanted",
    "fewer FLOPs in the layers",
    "all FLOPs ÷ dense",
    "accuracy (%)",
    "agreement with dense (%)",
    "McNemar's p against dense",
    "latency (ms)",
    "seconds to prune",
)


def command(*arguments: str | Path) -> None:
    """Run compress-model, its output beside ours."""
    print("$ compress-model", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "compress", *map(str, arguments)], check=True, stdout=sys.stderr)


def layer_flops(folder: Path, tokens: int) -> int:
    """FLOPs of the layers on one input of ``tokens``."""
    from compress.engine.config import config_of
    from compress.engine.flops import flops
    from compress.storage.checkpoint import Checkpoint

    return flops(config_of(Checkpoint.open(folder)), tokens).layers


def matched(removed: Callable[[float], float], wanted: float) -> float:
    """The ratio at which ``removed``, which rises with it, is ``wanted`` within TOLERANCE, by bisection.

    Widths are whole, so that may be impossible; then it is the nearest of those tried.
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
        self.card = self.evaluate(self.dense, folder / "dense.scorecard.json")
        self.tokens = self.card.task_protocol.mean_tokens

    def evaluate(self, model: Path, file: Path) -> Scorecard:
        from compress.report.compare import read_scorecards

        if not file.exists():
            scored = ("--baseline", self.dense, "--task-file", self.test)
            command("evaluate", model, *scored, "--json", file)
        return read_scorecards(file)[-1]

    def prune(self, name: str, ratio: float, output: Path) -> Path:
        recipe = output.with_name(f"{output.name}.yaml")
        settings = {
            "model": str(self.dense),
            "calibration": self.calibration,
            "steps": [METHODS[name](ratio)],
        }
        recipe.write_text(yaml.safe_dump(settings))
        command("run", recipe, "-o", output, "--overwrite")
        return output

    def removed(self, model: Path) -> float:
        """The share of the layers' FLOPs that is gone."""
        return 1 - layer_flops(model, self.tokens) / layer_flops(self.dense, self.tokens)

    def pruned(self, name: str, wanted: float) -> Path:
        """The model that ``name`` makes at a share of FLOPs to remove."""
        output = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{wanted:g}"
        if not (output / "compression.json").exists():
            ratio = wanted
            if name in BY_PARAMETERS:
                trial = output.with_name(f"{output.name}-trial")
                ratio = matched(lambda ratio: self.removed(self.prune(name, ratio, trial)), wanted)
            self.prune(name, ratio, output)
        return output

    def row(self, name: str, wanted: float) -> list[str]:
        model = self.pruned(name, wanted)
        card = self.evaluate(model, model.with_name(f"{model.name}.scorecard.json"))
        seconds = json.loads((model / "compression.json").read_text())["steps"][0]["seconds"]
        return [
            name,
            f"{wanted:.0%}",
            f"{self.removed(model):.1%}",
            f"{card.task.flops.value / self.card.task.flops.value:.3f}",
            *cells(card),
            f"{seconds:.1f}",
        ]

    def table(self, methods: list[str], ratios: list[float]) -> str:
        rows = [["dense", "–", "–", "1.000", *cells(self.card), "–"]]
        rows += [self.row(name, ratio) for ratio in ratios for name in methods]
        lines = [f"| {' | '.join(HEADINGS)} |", "| :--- |" + " ---: |" * (len(HEADINGS) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        protocol, measured = self.card.task_protocol, self.card.cost.measured
        lines += [
            "",
            f"- MiniLM-L6 fine-tuned on headlines; {protocol.examples:,} others to test on, "
            f"{protocol.mean_tokens} tokens long on average. FLOPs and latency are for one of that length.",
            f"- Calibration: {self.calibration['nsamples']} of the headlines it was trained on, "
            "without labels.",
            f"- Latency on {measured.device}, {measured.threads} threads, batch size 1: median "
            "(interquartile range). ± is a 95 % interval.",
        ]
        return "\n".join(lines) + "\n"


def cells(card: Scorecard) -> list[str]:
    task = card.task
    p = task.mcnemar_p.text if task.mcnemar_p else "–"
    return [task.accuracy.text, task.agreement.text, p, card.cost.measured.latency.text]


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.8], help="shares of FLOPs to remove"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=512, help="headlines to calibrate on")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-kprune"))
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    table = Bench(folder, arguments.samples).table(arguments.methods, arguments.ratios)
    (folder / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
