#!/usr/bin/env python
"""Choose the bits of every tensor of the demo model for several sizes, and measure what comes out.

Each row is one size. `mix` chooses the types, the step is run, and the result is scored as in the tables of
quantization methods: the same calibration windows (Brown), the same windows of two texts. Beside the measured
divergence stand the one that `mix` predicted, and the one that it measured on held-out calibration text.

    python scripts/benchmarks/mix.py [--methods awq gptq] [--sizes 104 87]

An interrupted benchmark goes on: what is in --folder already is not done again. Sensitivities are measured
once for all sizes and all methods that look at text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from common import Sheet, command, dense_model, lineage, parser, slug

SIZES = (104, 87)  # MB of tensors
CALIBRATION = {"source": "brown", "seed": 0, "nsamples": 8, "seqlen": 512}
TEXTS = {"wikipedia_512": "wikipedia", "brown_512": "brown:heldout"}
CONTEXT, WINDOWS = 512, 8  # tokens in a window, and windows, of each text
STEP = {"bits": 4, "group_size": 64}


def main() -> None:
    arguments = parser(__doc__, "mix")
    arguments.add_argument("--methods", nargs="+", default=["awq"], help="methods that carry the choice out")
    arguments.add_argument("--sizes", nargs="+", type=float, default=SIZES, help="MB of all tensors")
    given = arguments.parse_args()
    sheet = Sheet(given, like="quantization")
    dense = dense_model(sheet.folder)
    for method in given.methods:
        for size in given.sizes:
            name = f"{method}, mixed in {size:g} MB"
            print(f"== {name}", file=sys.stderr, flush=True)
            sheet.row(name, lambda m=method, s=size: measured(sheet.folder, dense, m, s))
    sheet.show()


def measured(folder: Path, dense: Path, method: str, size: float) -> dict[str, Any]:
    """The figures of one row; every part of the work that is there already is not done again."""
    output = folder / slug(f"{method}-{size:g}")
    recipe = output.with_name(f"{output.name}.yaml")
    chosen = choice(folder, dense, method, size, recipe)
    if not (output / "compression.json").exists():
        command("run", recipe, "-o", output, "--overwrite")
    document = lineage(output)
    done = document["steps"][0]
    figures: dict[str, Any] = {
        "size": {"value": document["result"]["bytes"], "unit": "bytes"},
        "predicted": {"value": chosen["predicted"], "unit": "nats/token"},
        "held_out": {"value": chosen["measured"], "unit": "nats/token"},
        "table_bits": {"value": chosen["table"], "unit": "bits"},
    }
    for key, text in TEXTS.items():
        card = output.with_name(f"{output.name}-{key}.json")
        if not card.exists():
            card.write_text(json.dumps(scored(dense, output, text)))
        fidelity = json.loads(card.read_text())
        figures |= {
            f"{key}.perplexity": fidelity["perplexity"],
            f"{key}.kl": fidelity["kl_mean"],
            f"{key}.agreement": fidelity["top1_agreement"],
        }
    return {
        "steps": [done_step(recipe)],
        "calibration": CALIBRATION,
        "figures": figures,
        "seconds": done["seconds"],
        "peak_memory_bytes": done["peak_memory_bytes"],
    }


def scored(dense: Path, model: Path, text: str) -> dict[str, Any]:
    """The fidelity of a model on a text."""
    from compress.calibration.text.windows import evaluation_windows
    from compress.engine.tokenizer import load_tokenizer
    from compress.evaluation.evaluate import compare_streams
    from compress.storage.checkpoint import Checkpoint

    windows = evaluation_windows(load_tokenizer(dense), text, CONTEXT, WINDOWS)
    checkpoints = Checkpoint.open(dense), Checkpoint.open(model)
    return compare_streams(*checkpoints, windows, "cpu", told).fidelity().model_dump(mode="json")


def told(text: str, share: float) -> None:
    """Progress, as lines on stderr."""
    print(f"{text}: {share:.0%}", file=sys.stderr, flush=True)


def done_step(recipe: Path) -> dict[str, Any]:
    """The step of a recipe file."""
    return yaml.safe_load(recipe.read_text())["steps"][0]


def choice(folder: Path, dense: Path, method: str, size: float, recipe: Path) -> dict[str, Any]:
    """What was chosen, as JSON beside the recipe; chosen if it is not there yet."""
    file = recipe.with_name(f"{recipe.stem}.choice.json")
    if file.exists() and recipe.exists():
        return json.loads(file.read_text())
    from compress.pipeline.mixing import OURS, Budget, choose_types
    from compress.pipeline.recipe import parse_recipe

    wanted = parse_recipe(
        {"model": str(dense), "calibration": CALIBRATION, "steps": [{"method": method, **STEP}]}
    )
    # Methods that look at text are imitated alike, so that they have their measurements in common.
    calibrated = wanted.steps[0][0].needs_calibration
    work = folder / ("sensitivities" if calibrated else "plain-sensitivities")
    work.mkdir(exist_ok=True)
    found = choose_types(wanted, OURS, None, Budget(nbytes=int(size * 1e6)), work, progress=told)
    recipe.write_text(yaml.safe_dump(found.recipe.resolved(), sort_keys=False))
    chosen = {
        "predicted": found.mix.predicted,
        "measured": found.mix.measured,
        "tried": found.mix.tried,
        "bytes": found.mix.nbytes,
        "table": int(next(kind for name, kind in found.mix.kinds.items() if "embed" in name)),
        "kinds": found.mix.kinds,
    }
    file.write_text(json.dumps(chosen, indent=1))
    return chosen


if __name__ == "__main__":
    main()
