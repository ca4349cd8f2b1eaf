"""Gates of an evaluation: what they decide, when, and what is kept however they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import compress.evaluation.evaluate
from compress.storage.lineage import read_lineage

from ..evaluation.harness.conftest import TASKS, write_task
from .common import Command, assert_one_sentence

SCORING = ["--context", "64", "--windows", "2"]
HOPELESS, TRIVIAL = "kl:below:0.000000001", "kl:below:100"


@pytest.fixture
def small(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compress.evaluation.evaluate, "measure", lambda *_, **__: None)
    return shutil.copytree(quantized, tmp_path / "small")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("compress.evaluate", evaluate, raising=False)


def test_a_gate_that_fails_ends_with_1_after_everything_is_shown_and_kept(
    command: Command, small: Path, tiny: Path, tmp_path: Path
):
    words = ["evaluate", small, "--baseline", tiny, *SCORING, "--json", tmp_path / "cards.json", "-q"]
    ended = command(*words, "--gate", TRIVIAL, "--gate", HOPELESS)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"Error: Gate {HOPELESS} failed: the KL divergence from the dense model is ")
    assert "perplexity" in ended.out  # the table
    assert len(json.loads((tmp_path / "cards.json").read_text())) == 2
    assert len(read_lineage(small).evaluations) == 2

    ended = command(*words, "--gate", TRIVIAL)
    assert ended.code == 0
    assert f"Gate {TRIVIAL} passed: " in ended.out


def test_a_gate_that_fails_leaves_json_alone(command: Command, small: Path, tiny: Path):
    ended = command("evaluate", small, "--baseline", tiny, *SCORING, "--json", "-q", "--gate", HOPELESS)
    assert ended.code == 1
    assert len(ended.document) == 2


def test_a_gate_on_tasks_and_the_verdict_that_is_kept(
    command: Command, small: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path, "choice", **TASKS["choice"])
    words = ["evaluate", small, "--baseline", tiny, *SCORING, "--tasks", "choice", "--include-path", tmp_path]
    ended = command(*words, "-q", "--margin", "2pt", "--gate", "choice:not-worse:1pt")
    assert ended.code == 1
    assert "Error: Gate choice:not-worse:1pt failed: its score changes by " in ended.err
    assert "is not ruled out." in ended.err
    dense, card = read_lineage(small).evaluations
    assert dense["harness"]["verdict"] is None
    verdict = card["harness"]["verdict"]
    assert (verdict["kind"], verdict["margin"]) == ("undecided", 0.02)
    assert verdict["sentence"].startswith(
        "Undecided whether it is worse than the dense model by more than 2 p"
    )
    assert f"\n**Verdict:** {verdict['sentence']}\n" in (small / "README.md").read_text()
    assert " ".join(ended.out.split()).count(verdict["sentence"]) == 1

    ended = command(*words, "-q", "--gate", "choice:not-worse:99pt")
    assert ended.code == 0


def test_a_gate_on_text_asks_for_more_than_one_window(command: Command, small: Path, tiny: Path):
    words = ["evaluate", small, "--baseline", tiny, "--context", "64", "--windows", "1", "-q"]
    ended = command(*words, "--gate", TRIVIAL)
    assert ended.code == 1
    assert "not below 100 beyond doubt" in ended.err


@pytest.mark.usefixtures("unmeasured")
def test_a_gate_on_the_quick_questions_needs_lm_eval(
    command: Command, quantized: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without it, the suite falls back to text alone."""
    monkeypatch.setattr("compress.evaluation.harness.ask.installed", lambda: False)
    words = ["evaluate", quantized, "--baseline", tiny, "--suite", "quick", "--gate", "kick:matching"]
    assert_one_sentence(command(*words), 1, "compress-model[eval]")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gate", "kick"], "'kick' is not a gate; write NAME:not-worse:1pt"),
        (["--gate", "kl:below:0"], "'kl:below:0' is not a gate"),
        (["--gate", "kick:not-worse:1%"], "'1%' is not a margin"),
        (["--margin", "1"], "'1' is not a margin"),
        (["--gate", "kick:matching"], "none is asked; name some with --suite or --tasks"),
        (["--gate", "kik:matching", "--suite", "kick"], "did you mean 'kick'"),
        (["--gate", "kl:below:1", "--task-file", "file"], "no text is scored; leave the gate out"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_the_work(
    command: Command, quantized: Path, tiny: Path, words: list[str], sentence: str
):
    assert_one_sentence(command("evaluate", quantized, "--baseline", tiny, *words), 2, sentence)


@pytest.mark.usefixtures("unmeasured")
def test_a_gate_needs_a_dense_model(command: Command, quantized: Path):
    assert_one_sentence(command("evaluate", quantized, "--gate", TRIVIAL), 2, "name that with --baseline")
