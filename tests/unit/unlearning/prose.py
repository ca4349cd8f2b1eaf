"""Sets of prose that a model with random weights can tell apart: what a text ends with decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORGET, RETAIN = "Z", "abcdefghi"


def texts(ends: str, count: int = 40) -> list[str]:
    """Texts of several lengths that end with the letters ``ends`` in turn."""
    return [
        f"{'well, ' * (number % 4)}text {number} {ends[number % len(ends)] * 12}" for number in range(count)
    ]


def write_sets(folder: Path) -> dict[str, str]:
    """Write both sets, and return the options that name them."""
    options: dict[str, str] = {}
    for what, ends in (("forget", FORGET), ("retain", RETAIN)):
        file = folder / f"{what}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts(ends)))
        options[what] = str(file)
    return options


def steps_with(sets: dict[str, str], *later: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Both methods, and steps after them."""
    return [
        {"method": "neuron-adjust", "share": 0.1, **sets},
        {"method": "key-space", "refusal": "No.", "coverage": 1.0, **sets, **options},
        *later,
    ]
