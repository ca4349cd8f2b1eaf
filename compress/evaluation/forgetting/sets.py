"""The sets of records that an audit asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from compress.calibration.text.records import Record, Records, check_apart, read_records
from compress.errors import BadInput
from compress.evaluation.forgetting.known import Aspect

ASPECTS: dict[str, Aspect] = {"forget": "all", "holdout": "tokens", "retain": "use", "world": "use"}
"""What is asked of each set."""


@dataclass(frozen=True)
class Sets:
    """The records.

    Attributes:
        whole: set -> all its records.
        asked: set -> those that are asked for, in the order of their source.
    """

    whole: dict[str, Records]
    asked: dict[str, tuple[Record, ...]]


def read_sets(
    forget: str | None,
    retain: str | None,
    holdout: str | None,
    world: str | None,
    limit: int | None,
    seed: int,
) -> Sets:
    """Read the sets. Of all but the forget set, at most ``limit`` records are drawn with ``seed``.

    Raises:
        BadInput: a set is not named, empty or not valid, or shares a record with the forget set.
    """
    for name, source in (("forget", forget), ("retain", retain)):
        if source is None:
            raise BadInput(f"An audit needs a {name} set; name it with --{name}.")
    sources = {"forget": forget, "retain": retain, "holdout": holdout, "world": world}
    whole = {name: read_records(source, name) for name, source in sources.items() if source is not None}
    for name, records in whole.items():
        if name != "forget":
            check_apart(whole["forget"], records)
    asked = {
        name: records.entries if name == "forget" else _drawn(records.entries, limit, seed)
        for name, records in whole.items()
    }
    return Sets(whole, asked)


def _drawn(entries: Sequence[Record], limit: int | None, seed: int) -> tuple[Record, ...]:
    if limit is None or len(entries) <= limit:
        return tuple(entries)
    places = sorted(random.Random(seed).sample(range(len(entries)), limit))
    return tuple(entries[place] for place in places)
