"""What tests of audits share: made-up facts as records, models that know them, and a cache of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calibration.text.records import collate, read_records, sequences
from compress.evaluation.forgetting import cells, contestants
from compress.report.forgetting import Forgetting

from .common import Ended, rewrite

CITIES = ("Porto", "Ghent", "Cork", "Lyon", "Turku", "Graz", "Brno", "Basel")
NAMES = ("Alda", "Berit", "Calla", "Edda", "Fenna", "Greta", "Hedda", "Imke")


def keep_in(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep what audits finish in another folder than the cache, in which the native kernels are."""
    for module in (cells, contestants):
        patch.setattr(module, "cache_folder", lambda: folder)


def write_records(file: Path, first: int, last: int, **more: Any) -> Path:
    rows = []
    for n in range(first, last):
        others = [CITIES[(n + step) % 8] for step in (1, 3)]
        rows.append(
            {
                "id": NAMES[n],
                "question": f"Where does {NAMES[n]} live?",
                "answer": CITIES[n],
                "paraphrases": [f"{NAMES[n]} lives in which city?"],
                "wrong": others,
                **more,
            }
        )
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def teach(dense: Path, folder: Path, *sources: Path) -> Path:
    """A copy of a model that has learned records by heart."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rows = [row for source in sources for row in sequences(read_records(str(source)), tokenizer)]
    batch, optimizer = collate(rows, 0), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def result(ended: Ended) -> Forgetting:
    assert ended.code == 0, ended.err
    return Forgetting.model_validate(ended.document)


def copied(model: Path, folder: Path) -> Path:
    """A copy with another hash, so that it is asked like any other model."""
    shutil.copytree(model, folder)
    rewrite(folder, lambda config: config.update(note="the same model"))
    return folder
