"""A tiny model, and tasks of every kind with their data beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

from compress.engine.opening import open_checkpoint
from compress.evaluation.harness.subject import Subject

WORDS = ["cat", "dog", "mouse", "house", "tree", "river", "stone", "bird"]
LINES = [
    {
        "question": f"Who sat on the {WORDS[n % 8]}{' and on the mat' * (n % 3)}?",
        "choices": [WORDS[(n + k) % 8] for k in range(2 + n % 3)],
        "label": n % 2,
        "text": f"The {WORDS[n % 8]} sat on the {WORDS[(3 * n + 1) % 8]}. " * (1 + n % 4),
    }
    for n in range(12)
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[label]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}
"""One of each kind of request that lm-eval knows."""


def write_task(folder: Path, name: str, lines: list[dict] = LINES, **settings: object) -> Path:
    """Write a task and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**about, "test_split": "test", **settings}))
    return file


def subject(folder: Path, **settings: Any) -> Subject:
    return Subject(folder.name, open_checkpoint(folder), **settings)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `TASKS`, and a group of two of them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("compress.evaluation.harness.cache.cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in TASKS.items():
        write_task(folder, name, **settings)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["choice", "say"]}))
    return folder


@pytest.fixture(scope="session")
def model(shared_decoder: Callable[..., Path]) -> Path:
    """A random Llama."""
    return shared_decoder(max_position_embeddings=256)
