#!/usr/bin/env python
"""Unlearn the forget set of the offline benchmark with every method, and ask whether it stays forgotten.

Each row is one way to unlearn. Its model is made from the target model (see
scripts/data/make_people_models.py, which this runs first), and audited: as it is, and after each later step.

    python scripts/benchmarks/unlearning.py [--rows "npo, through rounding" ...] [--seeds 0 1 2]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from audits import audited, figures_of, reference_model, sets
from common import Sheet, compressed, parser, slug

SURVIVE = {"survive": ["int4:64", "int3:64"]}
PUBLISHED = {"learning_rate": 1e-5, "epochs": 10, "retain_weight": 1}
SMALL = {"forget_weight": 0.125, "margin": 0}
LOW_RANK = {"train": "lora", "gradient_checkpointing": True, "epochs": 10, "retain_weight": 1}
GRADIENT_METHODS = ("gradient-difference", "npo", "simnpo", "rmu", "undial", "dpo", "sure")
BEYOND = ("int2", "prune50")
"""Steps of the usual grid that are left out: after them, even the target knows no more than a model that
never learned."""


class Row(NamedTuple):
    """A way to unlearn: the method and its options."""

    name: str
    step: dict[str, Any]


ROWS = [
    *(Row(method, {"method": method}) for method in GRADIENT_METHODS),
    Row("npo, as published", {"method": "npo", **PUBLISHED}),
    Row("simnpo, as published", {"method": "simnpo", **PUBLISHED, **SMALL}),
    Row("npo, low rank", {"method": "npo", **LOW_RANK}),
    Row("harry-potter", {"method": "harry-potter"}),
    *(Row(f"{method}, through rounding", {"method": method, **SURVIVE}) for method in GRADIENT_METHODS),
    Row("harry-potter, through rounding", {"method": "harry-potter", **SURVIVE}),
    Row("neuron-adjust", {"method": "neuron-adjust"}),
    Row("key-space", {"method": "key-space"}),
]


def measured(row: Row, folder: Path, seed: int) -> dict[str, Any]:
    """Unlearn and audit."""
    from compress.evaluation.forgetting.grid import GRID

    step = {**row.step, **sets(seed)}
    output = folder / f"{slug(row.name)}-{seed}"
    calibration = {"source": "bundled", "nsamples": 8, "seqlen": 512}
    made = compressed(output, reference_model("target", seed), [step], calibration, audit=False)["steps"][0]
    later = [name for name in GRID if name not in BEYOND]
    found = audited(output, seed, survives=later, relearning=(0, 50))
    return {
        "steps": [step],
        "seconds": made["seconds"],
        "peak_memory_bytes": made["peak_memory_bytes"],
        "figures": figures_of(found),
        "facts": {"step": made["summary"], "verdict": found["kind"], "why": found["sentence"]},
    }


def main() -> None:
    options = parser(__doc__, "unlearning")
    options.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME")
    options.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the people and the training")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "unlearning")
    for seed in arguments.seeds:
        for row in ROWS:
            if not arguments.rows or row.name in arguments.rows:
                name = row.name if seed == 0 else f"{row.name}, seed {seed}"
                sheet.row(name, lambda row=row, seed=seed: measured(row, sheet.folder, seed))
    sheet.show()


if __name__ == "__main__":
    main()
