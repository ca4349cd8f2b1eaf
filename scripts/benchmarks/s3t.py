#!/usr/bin/env python
"""Delete people from an ensemble that S3T trained on the offline benchmark, and ask what it still knows.

S3T trains ``demo`` on what the target model learned (see scripts/data/make_people_models.py, which this runs
first). The records of the people to forget are known to be likelier to be deleted, and the orders of slices
are made for that. Rows delete first what was expected, then records of others that nobody expected. Each is
audited beside the target, which was trained as usual.

    python scripts/benchmarks/s3t.py [--seed 0]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from audits import audited, figures_of, sets
from common import Sheet, command, lineage, parser

TRAINING = {
    "shards": 3,
    "slices": 3,
    "orders": 1,
    "expected_deletions": 54,
    "epochs": 4,
    "batch_size": 4,
    "learning_rate": 5e-4,
}
LIKELY, UNLIKELY = 0.9, 0.01
"""Chances that records are deleted: those of the people to forget, and those of others."""
OTHERS = (0, 3)
"""How many records of others are deleted, too."""


def records(seed: int) -> dict[str, list[dict[str, str]]]:
    """The lines of the training data by the set that they are from."""
    from compress.calibration.text.records import read_records

    def line(record: Any) -> dict[str, str]:
        keys = ("id", "text", "question", "answer")
        return {key: getattr(record, key) for key in keys if getattr(record, key) is not None}

    sources = {**sets(seed), "world": "people:world"}
    return {name: [line(each) for each in read_records(source).entries] for name, source in sources.items()}


def trained(folder: Path, data: dict[str, list[dict[str, str]]], seed: int) -> Path:
    """The folder of the ensemble that has seen everything; trained if it is not there yet."""
    output, lines, priors = folder / "trained", folder / "records.jsonl", folder / "priors.json"
    if not (output / "compression.json").exists():
        chances = {
            line["id"]: LIKELY if name == "forget" else UNLIKELY
            for name, found in data.items()
            for line in found
        }
        lines.write_text("".join(json.dumps(line) + "\n" for found in data.values() for line in found))
        priors.write_text(json.dumps(chances))
        options = [f"--{key.replace('_', '-')}={value}" for key, value in TRAINING.items()]
        options += ["--priors", str(priors), "--seed", str(seed)]
        command("s3t", "train", "demo", lines, "-o", output, *options)
    return output


def measured(ensemble: Path, ids: list[str], seed: int) -> dict[str, Any]:
    """Delete records from a copy of the ensemble, and audit what is left."""
    from compress.pipeline.sharded import delete
    from compress.storage.sharded import read_sharded

    left, step = ensemble.with_name("left"), lineage(ensemble)["steps"][0]
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(ensemble, left)
    began = time.perf_counter()
    if ids:
        delete(left, ids)
    seconds = time.perf_counter() - began if ids else step["seconds"]
    found = audited(left, seed, relearning=())
    shards = read_sharded(left).shards
    in_use = sum(len(shard.slices[number]) for shard in shards for number in shard.served.prefix)
    counts = {
        "deleted": len(ids),
        "in use": in_use,
        "exhausted": sum(not shard.served.prefix for shard in shards),
    }
    return {
        "steps": [{"method": "s3t", **TRAINING}],
        "seconds": seconds,
        "peak_memory_bytes": None if ids else step["peak_memory_bytes"],
        "figures": {**figures_of(found), **{name: {"value": count} for name, count in counts.items()}},
        "facts": {"verdict": found["kind"], "why": found["sentence"]},
    }


def main() -> None:
    options = parser(__doc__, "s3t")
    options.add_argument("--seed", type=int, default=0, help="of the people and the training")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "s3t")
    seed, data = arguments.seed, records(arguments.seed)
    ensemble = trained(sheet.folder, data, seed)
    expected = [line["id"] for line in data["forget"]]
    others = [line["id"] for name in ("retain", "world") for line in data[name]]
    unexpected = random.Random(seed).sample(others, max(OTHERS))
    sheet.row("nothing", lambda: measured(ensemble, [], seed))
    for count in OTHERS:
        name = "6 people" + (f" and {count} records of others" if count else "")
        sheet.row(name, lambda count=count: measured(ensemble, expected + unexpected[:count], seed))
    sheet.show()


if __name__ == "__main__":
    main()
