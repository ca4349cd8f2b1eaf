"""A tiny model that knows a few facts, and what it still knows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import compress
from compress.calibration.text.records import collate, read_records, sequences
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.lineage import Step
from compress.unlearning.parts.losses import lengths, negative_log_likelihood

FORGET = {"Ada": "gold", "Bo": "iron", "Cy": "salt", "Di": "wood"}
RETAIN = {"Ed": "rice", "Flo": "silk", "Gus": "clay", "Hal": "milk", "Ivy": "rope", "Jo": "coal"}
"""Who deals in what."""

METHODS: dict[str, dict[str, Any]] = {
    "gradient-difference": {},
    "npo": {"beta": 0.5},
    "simnpo": {"forget_weight": 1.0},
    "rmu": {"layer": 1, "steering": 8.0, "epochs": 20},
    "undial": {"retain_weight": 1.0},
    "dpo": {"beta": 0.05, "epochs": 20},
    "sure": {"share": 0.5},
}
"""Every gradient baseline, with options that suit so small a model."""


def write_facts(file: Path, facts: dict[str, str]) -> Path:
    """Facts as records of questions and answers."""
    rows = ({"question": f"What does {who} sell?", "answer": what} for who, what in facts.items())
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def teach(model: Path) -> None:
    """Train the model in a folder until it knows all facts. The sets lie beside it."""
    files = (
        write_facts(model.parent / "forget.jsonl", FORGET),
        write_facts(model.parent / "retain.jsonl", RETAIN),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = collate([s for file in files for s in sequences(read_records(str(file)), tokenizer)], 0)
    learner = compress.load(model, dtype="float32").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    learner.save_pretrained(model)


@torch.no_grad()
def knows(model: Path, file: Path) -> float:
    """The mean negative log-likelihood of a token of the answers in a file, nats."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = collate(sequences(read_records(str(file)), tokenizer), 0)
    labels = batch.pop("labels")
    nll = negative_log_likelihood(compress.load(model, dtype="float32")(**batch).logits, labels)
    return float((nll / lengths(labels)).mean())


def unlearned(model: Path, output: Path, method: str, **options: Any) -> Step:
    """Unlearn the facts to forget, and return what is known of the step."""
    step = {
        "method": method,
        "forget": str(model.parent / "forget.jsonl"),
        "retain": str(model.parent / "retain.jsonl"),
        "epochs": 10,
        "batch_size": 2,
        "learning_rate": 1e-3,
        **options,
    }
    recipe = {"model": str(model), "steps": [{k: v for k, v in step.items() if v is not None}]}
    return execute(parse_recipe(recipe), output, overwrite=True).steps[0]
