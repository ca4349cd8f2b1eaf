"""The bundled questions, made by ``scripts/data/make_kick.py``."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from compress.calibration.text.sources import read_documents

if TYPE_CHECKING:
    from datasets import Dataset


def items(task: str) -> list[dict[str, Any]]:
    """Every item of a file, in its order."""
    return [json.loads(line) for line in gzip.decompress(_file(f"{task}.jsonl.gz")).splitlines()]


def told_by(task: str) -> frozenset[str]:
    """sha256 of the documents that tell what a task asks, as calibration records them; often there is none.

    The stories of ``kick_summary`` are parts of ``bundled:evaluation``. No question is told by a paragraph of
    ``bundled``, so models calibrated on that may be asked everything.
    """
    if task != "kick_summary":
        return frozenset()
    return frozenset(read_documents("bundled:evaluation").hashes)


def load(*, questions: str, **metadata: object) -> dict[str, Dataset]:
    """The data set of a task, as lm-eval asks for it: the splits ``test`` and ``examples``.

    Args:
        questions: name of the file; lm-eval gives it from the task's ``dataset_kwargs``.
        metadata: of the task; not needed here.
    """
    from datasets import Dataset

    splits: dict[str, list[dict[str, Any]]] = {"test": [], "examples": []}
    for item in items(questions):
        split = item.pop("split")
        splits[split].append({name: _flat(value) for name, value in item.items()})
    return {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}


def _flat(value: Any) -> Any:
    """A value that a column of a table holds: the arguments of rules differ, so they are JSON."""
    return json.dumps(value) if isinstance(value, dict) else value


def _file(name: str) -> bytes:
    return resources.files("compress.evaluation.kick").joinpath("data", name).read_bytes()
