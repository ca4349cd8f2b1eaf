#!/usr/bin/env python3
"""Make ``compress/evaluation/published.json``: published scores of dense models, with their source.

The repository of Pythia (Apache-2.0) keeps what lm-eval said of Pythia, OPT and BLOOM. This takes the
accuracies of six tasks. Run it again and the same bytes come out.

    git clone https://github.com/EleutherAI/pythia
    python scripts/data/make_published_scores.py pythia [OUTPUT]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMIT = "a19eecb807ec2c79a39ebf18108816e6ffffc1d5"
OUTPUT = Path(__file__).resolve().parents[2] / "compress" / "evaluation" / "published.json"
TASKS = ("arc_challenge", "arc_easy", "lambada_openai", "piqa", "sciq", "winogrande")
METRICS = ("acc", "acc_norm")
PYTHIA = ("70m", "160m", "410m", "1.4b", "2.8b", "6.9b", "12b")
OPT = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b")
BLOOM = ("560m", "1b1", "1b7", "3b", "7b1")


def files() -> Iterator[tuple[str, str]]:
    """Hub ids, and the file with a model's scores."""
    for size in PYTHIA:
        folder = f"evals/pythia-v1/pythia-{size}"
        yield f"EleutherAI/pythia-{size}", f"{folder}/zero-shot/{size}_step143000.json"
        yield f"EleutherAI/pythia-{size}", f"{folder}/five-shot/{size}-5shot_step143000.json"
    yield from ((f"facebook/opt-{size}", f"evals/opt/opt-{size}.json") for size in OPT)
    yield from ((f"bigscience/bloom-{size}", f"evals/bloom/bloom-{size}.json") for size in BLOOM)


def read(repository: str, file: str) -> dict[str, Any]:
    command = ["git", "-C", repository, "show", f"{COMMIT}:{file}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def scores(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> score, with the four digits that matter."""
    found = {task: document["results"][task] for task in TASKS if task in document["results"]}
    return {
        task: {metric: round(values[metric], 4) for metric in METRICS if metric in values}
        for task, values in found.items()
    }


def main(repository: str, output: Path) -> None:
    by_shots: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for model, file in files():
        document = read(repository, file)
        assert document["config"]["limit"] is None, file
        by_shots.setdefault(document["config"]["num_fewshot"], {})[model] = scores(document)
    parts = [
        {
            "source": "github.com/EleutherAI/pythia, evals",
            "commit": COMMIT,
            "fewshot": fewshot,
            "models": models,
        }
        for fewshot, models in sorted(by_shots.items())
    ]
    output.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else OUTPUT)
