"""Finished cells of an audit: what one model knew of one set after one way, kept as JSON in the cache.

An audit that was interrupted goes on behind its last finished cell, and the cells of the target and of the
retrained model serve all audits of models that were unlearned in other ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.evaluation.forgetting.contestants import FOLDER
from compress.evaluation.forgetting.known import Known
from compress.evaluation.harness.cache import digest
from compress.report.forgetting import Codes
from compress.system.cache import cache_folder, make_folder
from compress.system.files import write_atomically

VERSION = 3
"""The version of how records are asked; a cell of another one is not read."""


def cell(key: Mapping[str, Any], ask: Callable[[], Sequence[Known]]) -> list[Known]:
    """What a model knows of a set, which is asked if that is not known yet.

    Args:
        key: everything that it depends on.
        ask: asks the model.
    """
    file = cell_file(key)
    if (found := read_cell(file)) is None:
        found = list(ask())
        _write(file, key, [each.model_dump(mode="json") for each in found])
    return found


def read_cell(file: Path) -> list[Known] | None:
    """A finished cell; None if there is none that can be read."""
    rows = _read(file)
    try:
        return None if rows is None else [Known.model_validate(row) for row in rows]
    except (TypeError, ValidationError):
        return None


def codes_cell(key: Mapping[str, Any], compare: Callable[[], Codes | None]) -> Codes | None:
    """How many codes of two models differ, which are compared if that is not known yet."""
    file = cell_file(key)
    if (known := _read(file)) is not None:
        return Codes.model_validate(known[0]) if known else None
    found = compare()
    _write(file, key, [found.model_dump()] if found else [])
    return found


def cell_file(key: Mapping[str, Any]) -> Path:
    """Where a cell is kept."""
    return cache_folder() / FOLDER / "cells" / f"{digest(VERSION, dict(key))}.json"


def _read(file: Path) -> list[Any] | None:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if isinstance(rows, list) else None


def _write(file: Path, key: Mapping[str, Any], rows: list[Any]) -> None:
    make_folder(file.parent)
    write_atomically(file, json.dumps({"key": dict(key), "rows": rows}, default=str))
