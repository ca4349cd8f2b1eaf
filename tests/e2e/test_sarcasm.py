"""The fine-tuned encoder: made, good at its task, inspected, planned, quantized, and the same everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress
from compress.calibration.text.sources import read_documents

pytestmark = pytest.mark.e2e

CALIBRATION, TEST = "calibration.jsonl", "test.jsonl"


@pytest.fixture(scope="module")
def sarcasm() -> Path:
    script = Path(__file__).parents[2] / "scripts" / "data" / "make_sarcasm_model.py"
    made = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    return Path(made.stdout.strip())


def command(*words: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_it_tells_sarcasm(sarcasm: Path):
    (card,) = command("evaluate", sarcasm, "--task-file", sarcasm / TEST, "--json", "-")
    accuracy, protocol = card["task"]["accuracy"], card["task_protocol"]
    print(f"accuracy {accuracy}, {protocol}")
    assert accuracy["value"] > 0.85
    assert (protocol["examples"], protocol["cut"]) == (1000, 0)
    assert card["task"]["agreement"]["value"] == 1


def test_trained_on_and_tested_on_are_apart(sarcasm: Path):
    trained, tested = (read_documents(str(sarcasm / name)) for name in (CALIBRATION, TEST))
    assert (len(set(trained.hashes)), len(set(tested.hashes))) == (4800, 1000)
    assert not set(trained.hashes) & set(tested.hashes)


@torch.no_grad()
def test_loaded_by_us_as_by_transformers(sarcasm: Path):
    tokenizer = AutoTokenizer.from_pretrained(sarcasm)
    texts = ["area man wins argument with self", "senate passes budget after a long debate in washington"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    theirs = AutoModelForSequenceClassification.from_pretrained(sarcasm, attn_implementation="eager").eval()
    ours = compress.load(sarcasm)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=0)


def test_inspected_planned_and_quantized(sarcasm: Path, tmp_path: Path):
    assert command("inspect", sarcasm, "--json")["model_type"] == "bert"
    recipe = tmp_path / "recipe.yaml"
    step = {"method": "rtn", "bits": 8, "group_size": 32}
    recipe.write_text(yaml.safe_dump({"model": str(sarcasm), "steps": [step]}))
    planned = command("plan", sarcasm, recipe, "--json")["after"]["bytes"]

    quantized = tmp_path / "quantized"
    made = command(
        "quantize", sarcasm, "--method", "rtn", "--bits", "8", "--group-size", "32", "-o", quantized, "--json"
    )
    assert made["result"]["bytes"] == planned
    some = tmp_path / "some.jsonl"
    some.write_text("".join((sarcasm / TEST).read_text().splitlines(keepends=True)[:200]))
    scored = ("--baseline", sarcasm, "--task-file", some)
    dense, card = command("evaluate", quantized, *scored, "--json", "-")
    assert card["task"]["agreement"]["value"] > 0.97
    assert card["cost"]["weight_bytes"] < dense["cost"]["weight_bytes"]
    assert "accuracy" in (quantized / "README.md").read_text()
