#!/usr/bin/env python3
"""Make ``compress/evaluation/kick/data``: the questions of KICK's offline tasks.

The questions come from the World Factbook, WordNet and the Elements database (see ``kick/sources.py``). No
paragraph of the calibration text ``bundled`` holds both what a question asks about and its answer. Run it
again and the same bytes come out.

    python scripts/data/make_kick.py [--sources FOLDER] [OUTPUT]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from kick import leaks, questions
from kick.facts import all_facts
from kick.instructions import instructions
from kick.sources import LICENCES, SHA256, read_sources
from kick.summaries import stories

OUTPUT = Path(__file__).resolve().parents[2] / "compress" / "evaluation" / "kick" / "data"
VERSION = 1
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT)
    parser.add_argument("--sources", type=Path, help="folder that holds the three packages, or gets them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = make(options.sources or Path(scratch))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (options.output / name).write_bytes(content)
        print(f"{name}: {len(content):,} bytes")


def make(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file; packages that ``folder`` lacks are downloaded into it."""
    sources = read_sources(folder)
    facts = leaks.without(all_facts(sources))
    dealer = questions.Dealer(facts, SEED)
    tasks = {
        "factoid": questions.factoid(dealer),
        "choice": questions.choice(dealer),
        "retrieval": questions.retrieval(dealer),
        "summary": stories(SEED),
        "instruct": instructions(sources, facts, SEED),
    }
    files = {f"{task}.jsonl.gz": packed(task, items) for task, items in tasks.items()}
    return files | {"about.json": about(files, tasks)}


def packed(task: str, items: list[dict[str, Any]]) -> bytes:
    lines = (json.dumps({"id": f"{task}-{number}", **item}) + "\n" for number, item in enumerate(items))
    return gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)


def about(files: dict[str, bytes], tasks: dict[str, list[dict[str, Any]]]) -> bytes:
    content = {
        "version": VERSION,
        "seed": SEED,
        "sources": {name: {"sha256": SHA256[name], "licence": LICENCES[name]} for name in SHA256},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "items": len(tasks[name.split(".")[0]])}
            for name, data in files.items()
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()


if __name__ == "__main__":
    main()
