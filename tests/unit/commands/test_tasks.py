"""Tasks of lm-eval through the command line: asked, judged, kept, and what goes wrong in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import compress.evaluation.evaluate
from compress.evaluation.harness import ask as asking
from compress.evaluation.kick.judge import LocalJudge
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import read_lineage

from ..evaluation.harness.conftest import TASKS, write_task
from ..evaluation.harness.conftest import tasks as tasks
from .common import Command, assert_one_sentence, rewrite

TEXT = ["--context", "64", "--windows", "2"]


@pytest.fixture
def quantized(quantized: Path, tmp_path: Path) -> Path:
    """A copy, because evaluations are added to it, and other tests count theirs."""
    return shutil.copytree(quantized, tmp_path / "quantized")


@pytest.fixture(autouse=True)
def not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress.evaluation.evaluate, "measure", lambda *_, **__: None)


def test_a_model_is_judged_by_its_answers(
    command: Command, quantized: Path, tiny: Path, tasks: Path, tmp_path: Path
):
    options = ["--tasks", "choice,say", "--include-path", tasks, *TEXT, "--samples", tmp_path / "samples"]
    ended = command("evaluate", quantized, "--baseline", tiny, *options, "--json")
    dense, model = ended.document
    for card in (dense, model):
        protocol = card["harness_protocol"]
        assert [task["task"] for task in protocol["tasks"]] == ["choice", "say"]
        assert [result["task"] for result in card["harness"]["tasks"]] == ["choice", "say"]
        assert card["fidelity"] is not None
        assert (protocol["suite"], protocol["chat_template"], protocol["seed"]) == (None, False, 1234)
    assert dense["harness"]["verdict"] is None
    assert model["harness"]["verdict"]["questions"] == 24
    assert dense["harness_protocol"]["kernel"] == "torch" == dense["protocol"]["kernel"]
    assert model["harness_protocol"]["kernel"] == model["protocol"]["kernel"]
    assert read_lineage(quantized).evaluations[-1] == model
    rows = (tmp_path / "samples" / quantized.name / "say.jsonl").read_text().splitlines()
    assert [row["scores"].keys() for row in map(json.loads, rows)] == [{"exact_match"}] * 12


def test_samples_of_two_models_of_one_name_are_kept_apart(
    command: Command, quantized: Path, tiny: Path, tasks: Path, tmp_path: Path
):
    """As are those of two sizes of one model."""
    other = Path(shutil.copytree(tiny, tmp_path / "dense" / quantized.name))
    options = ["--tasks", "say", "--include-path", tasks, *TEXT, "--samples", tmp_path / "samples", "-q"]
    assert command("evaluate", quantized, "--baseline", other, *options).code == 0
    files = sorted((tmp_path / "samples").rglob("say.jsonl"))
    assert len(files) == 2
    assert files[0].read_text() != files[1].read_text()


@pytest.fixture
def opinions(tasks: Path) -> Path:
    """A task that has no right answers, beside the others."""
    settings = TASKS["say"] | {"metadata": {"judged": True}}
    write_task(tasks, "opinions", **settings)
    return tasks


def test_a_judge_compares_open_answers(
    command: Command,
    quantized: Path,
    tiny: Path,
    opinions: Path,
    write_decoder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[str] = []

    def says_b(self: LocalJudge, prompts: Sequence[str]) -> list[str]:
        seen.extend(prompts)
        assert len(self._said(prompts[:2])) == 2  # the model can be asked, though it says nothing of use
        return ["[[B]]"] * len(prompts)

    monkeypatch.setattr(LocalJudge, "__call__", says_b)
    monkeypatch.setattr("compress.evaluation.kick.judge.PROMPT", "{first}|{second}")
    judge = write_decoder(tmp_path / "judge", "GPT2LMHeadModel")
    options = ["--tasks", "opinions,choice", "--include-path", opinions, "--judge", judge, *TEXT]
    options += ["--samples", tmp_path]
    dense, model = command("evaluate", quantized, "--baseline", tiny, *options, "--json").document
    assert [result["judged"] for result in dense["harness"]["tasks"]] == [None, None]
    found, nothing = (result["judged"] for result in model["harness"]["tasks"])
    assert nothing is None
    assert found["judge"] == Checkpoint.open(judge).sha256
    assert (found["ties"], found["score"]["value"]) == (12, 0.5)  # it always prefers what stands second
    before, after = (
        [json.loads(row)["answer"] for row in (tmp_path / of.name / "opinions.jsonl").open()]
        for of in (tiny, quantized)
    )
    assert seen[:12] == [f"{one}|{other}" for one, other in zip(before, after, strict=True)]
    shown = command("compare", quantized).out
    assert f"judge {found['judge'][:8]}" in " ".join(shown.split())
    assert "12 pairs are ties, and 0 got no verdict" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "choice"], "None of these tasks needs a judge (choice)"),
        (["--tasks", "opinions"], "choose a judge of another family"),
        ([], "A judge needs questions"),
    ],
)
def test_a_judge_that_cannot_judge(
    command: Command, quantized: Path, tiny: Path, opinions: Path, options: list[str], words: str
):
    given = ["--include-path", opinions, "--judge", tiny, *options, "-q"]
    assert_one_sentence(command("evaluate", quantized, "--baseline", tiny, *given), 2, words)
    if options:
        ended = command("evaluate", quantized, *given)
        assert_one_sentence(ended, 2, "name that with --baseline")


def test_dense_against_dense_is_not_worse(command: Command, tiny: Path, copy: Path, tasks: Path):
    rewrite(copy, lambda config: config.update(note="the same model"))
    options = ["--tasks", "choice,last_word", "--include-path", tasks, *TEXT, "--json"]
    _, same = command("evaluate", copy, "--baseline", tiny, *options).document
    for result in same["harness"]["tasks"]:
        assert (result["lost"], result["gained"], result["p"]["value"]) == (0, 0, 1)


def test_the_dense_model_is_asked_once(
    command: Command, quantized: Path, tiny: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = []
    real = asking.Respondent._load
    monkeypatch.setattr(
        asking.Respondent, "_load", lambda self: loaded.append(self._subject.name) or real(self)
    )
    options = ["--tasks", "choice", "--include-path", tasks, *TEXT, "--json"]
    first = command("evaluate", tiny, *options).document
    both = command("evaluate", quantized, "--baseline", tiny, *options).document
    assert loaded == [tiny.name, quantized.name]
    assert both[0]["harness"] == first[0]["harness"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tasks", "sai"], 2, "There is no task 'sai'; did you mean 'say'?"),
        (["--suite", "kick", "--tasks", "say"], 2, "leave out --suite or --tasks"),
        (["--suite", "cick"], 2, "'cick' is not one of"),
        (["--tasks", "say", "--task-file", "x.jsonl"], 2, "Encoders are scored on a task file or not at all"),
        (["--tasks", "say", "--batch-size", "0"], 2, "'0' is neither a number above 0 nor auto"),
        (["--tasks", "say", "--limit", "0"], 2, "0 is not in the range"),
        (["--tasks", "say", "--include-path", "nowhere"], 2, "There is no folder 'nowhere' with tasks."),
        (["--tasks", "say", "--chat-template"], 2, "has no chat template"),
        (["--tasks", "say", "--samples", "/dev/null/x"], 2, "'/dev/null/x' for questions and answers cannot"),
        (["--tasks", "say", "--samples", "/dev/null"], 2, "'/dev/null' is a file; name a folder"),
    ],
)
def test_wrong_options_get_one_sentence(
    command: Command, tiny: Path, tasks: Path, options: list[str], code: int, words: str, monkeypatch
):
    real = asking.find_spec("lm_eval") and __import__("lm_eval.tasks").tasks.TaskManager
    monkeypatch.setattr(
        "compress.evaluation.harness.tasks.TaskManager",
        lambda **settings: real(**{**settings, "include_defaults": False}),
    )
    path = [] if "--include-path" in options else ["--include-path", tasks]
    text = [] if "--task-file" in options else TEXT
    assert_one_sentence(command("evaluate", tiny, *options, *path, *text, "-q"), code, words)


def test_without_lm_eval_text_is_scored_and_tasks_are_refused(
    command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    words = "Asking questions needs lm-eval; run `pip install 'compress-model[eval]'`."
    for options in (["--tasks", "say"], ["--suite", "kick"]):
        assert_one_sentence(command("evaluate", tiny, *options, *TEXT, "-q"), 1, words)
    ended = command("evaluate", tiny, "--suite", "quick", *TEXT, "-q", "--json")
    assert ended.code == 0
    assert ended.document[0]["harness"] is None
    assert ended.err == (
        "Only text is scored, because lm-eval is missing: pip install 'compress-model[eval]'.\n"
    )


def test_a_full_disk_is_one_sentence(command: Command, tiny: Path, tasks: Path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        import errno
        import os

        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("compress.evaluation.harness.cache.gzip.open", full)
    ended = command("evaluate", tiny, "--tasks", "say", "--include-path", tasks, *TEXT, "-q")
    assert_one_sentence(ended, 1, "cannot be written (No space left on device); free some space")


def test_a_model_is_not_asked_what_it_was_calibrated_on(
    command: Command, quantized: Path, tiny: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    told = ["a" * 64]
    calibrated = SimpleNamespace(chain=lambda: [SimpleNamespace(calibration={"document_sha256": told})])
    monkeypatch.setattr("compress.evaluation.beforehand.read_lineage", lambda folder: calibrated)
    monkeypatch.setattr(
        compress.evaluation.evaluate, "told_by", lambda task: set(told) if task == "say" else set()
    )
    options = ["--baseline", tiny, "--include-path", tasks, *TEXT, "--tasks"]
    refused = command("evaluate", quantized, *options, "choice,say", "--quiet")
    assert_one_sentence(refused, 2, "was calibrated on 1 of the documents of 'say'; leave that task out")


def test_a_recipe_asks_tasks(command: Command, tiny: Path, tasks: Path, tmp_path: Path):
    evaluate = {"context": 64, "windows": 2, "tasks": ["choice"], "include_path": [str(tasks)], "limit": 5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(tiny), "steps": [], "evaluate": evaluate}))
    assert command("run", recipe, "-o", tmp_path / "out").code == 0
    card = read_lineage(tmp_path / "out").evaluations[-1]
    assert card["harness_protocol"]["tasks"][0]["questions"] == 5


def test_other_tools_models_stand_in_the_same_table(command: Command, tiny_decoder, tasks: Path):
    folder = tiny_decoder("GPTNeoForCausalLM", num_layers=2, attention_types=[[["global"], 2]], num_heads=4)
    options = ["--tasks", "choice", "--include-path", tasks, *TEXT, "--json"]
    (card,) = command("evaluate", folder, *options).document
    assert (card["fidelity"], card["loads_with"]) == (None, "transformers")
    assert card["harness_protocol"]["kernel"] == "transformers"
    assert card["cost"]["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert command("evaluate", folder, *TEXT).code == 2
