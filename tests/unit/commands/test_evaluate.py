"""Evaluations through the command line: made, kept, shown, compared, of the right revision."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.evaluation.evaluate
from compress.evaluation.timed import Settings, device_name
from compress.kernels.ops import backend_of
from compress.report.scorecard import Figure, Measurement, Scorecard
from compress.sources.find import ModelSource, find_model
from compress.storage.lineage import read_lineage

from .common import RTN, Command, Ended, assert_one_sentence, rewrite

SCORING = ["--context", "64", "--windows", "2"]


def test_dense_against_dense_is_no_difference(command: Command, tiny: Path, copy: Path, monkeypatch):
    """The copy has another hash, so it is streamed and scored like any other model."""
    rewrite(copy, lambda config: config.update(note="the same model"))
    measured = Scorecard.model_fields["cost"].annotation.model_fields["measured"].default
    monkeypatch.setattr(compress.evaluation.evaluate, "measure", lambda *_, **__: measured)
    dense, same = command("evaluate", copy, "--baseline", tiny, *SCORING, "--json").document
    assert dense["model"]["sha256"] == dense["baseline"]["sha256"] == same["baseline"]["sha256"]
    assert same["model"]["sha256"] != dense["model"]["sha256"]
    for card in (dense, same):
        fidelity = card["fidelity"]
        assert fidelity["kl_mean"]["value"] == 0
        assert fidelity["top1_agreement"]["value"] == 1
        assert fidelity["perplexity_ratio"]["value"] == 1
    assert same["fidelity"]["perplexity"] == dense["fidelity"]["perplexity"]
    assert len(command("evaluate", copy, *SCORING, "--json").document) == 1
    assert not (copy / "compression.json").exists()


def unmeasured(monkeypatch: pytest.MonkeyPatch, device: str = "") -> list[str]:
    """Nothing is timed; the names of the folders that would have been."""
    asked: list[str] = []

    def measure(folder: Path, settings: Settings, **_: Any) -> Measurement:
        asked.append(folder.name)
        return Measurement(
            peak_resident_bytes=2,
            baseline_resident_bytes=1,
            prefill=Figure(value=200, unit="tokens/s"),
            prefill_tokens=16,
            prefill_repetitions=1,
            threads=torch.get_num_threads(),
            device=device or device_name(torch.device("cpu")),
            kernel="torch",
            storage_dtype="float32",
        )

    monkeypatch.setattr(compress.evaluation.evaluate, "measure", measure)
    return asked


def test_what_another_machine_measured_does_not_stand_for_this_one(
    command: Command, quantized: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = Path(shutil.copytree(quantized, tmp_path / "dense"))
    options = ["--baseline", dense, *SCORING, "-q", "--json"]
    unmeasured(monkeypatch, "another processor")
    command("evaluate", dense, *SCORING, "-q")
    asked = unmeasured(monkeypatch)
    devices = [card["cost"]["measured"]["device"] for card in command("evaluate", tiny, *options).document]
    assert devices == [device_name(torch.device("cpu"))] * 2
    assert asked == ["dense", "tiny"]
    command("evaluate", dense, *SCORING, "-q")
    asked.clear()
    command("evaluate", tiny, *options)
    assert asked == ["tiny"]


def test_another_kernel_scores_the_dense_model_again(
    command: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = shutil.copytree(quantized, tmp_path / "model")
    scored: list[str] = []
    real = compress.evaluation.evaluate.last_hidden
    unmeasured(monkeypatch)
    monkeypatch.setattr(compress.evaluation.evaluate, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(
        compress.evaluation.evaluate,
        "last_hidden",
        lambda *args: scored.append(backend_of("cpu")) or real(*args),
    )
    kernels = ["auto", "reference", "reference", "auto"]
    for kernel in kernels:
        assert command("evaluate", model, *SCORING, "-q", "--kernel", kernel).code == 0
    assert len(scored) == len(set(scored))
    assert "reference" in scored


@pytest.mark.parametrize("name", [".", "..", "../copy/."])
def test_a_folder_has_a_name_however_it_is_written(
    command: Command, copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    unmeasured(monkeypatch)
    (copy / "inside").mkdir()
    monkeypatch.chdir(copy / "inside" if name == ".." else copy)
    ended = command("evaluate", name, *SCORING, "-q", "--json")
    assert ended.code == 0, ended.err
    assert ended.document[0]["model"]["name"] == "copy"


def test_a_copy_of_the_dense_model_is_said_to_be_one(
    command: Command, copy: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    unmeasured(monkeypatch)
    ended = command("evaluate", copy, "--baseline", tiny, *SCORING, "-q", "--json")
    assert len(ended.document) == 1
    assert (
        ended.err
        == f"'{copy}' has the same weights as the dense model '{tiny}', so only that one is evaluated.\n"
    )
    assert command("evaluate", copy, *SCORING, "-q", "--json").err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baseline", ""], "There is no model folder ''."),
        (["--baseline", "dense", "--tasks", ","], "--tasks ',' names no task"),
        (["--baseline", "dense", "--suite", "quick", "--limit", "1", "--judge", ""], "no model folder ''."),
    ],
)
def test_an_empty_name_is_not_taken_for_none(
    command: Command, copy: Path, quantized: Path, options: list[str], words: str, monkeypatch
):
    """Such as that of a variable which a script forgot to set: no gate passes without a dense model."""
    unmeasured(monkeypatch)
    copy.rename(copy.with_name("dense"))
    monkeypatch.chdir(copy.parent)
    gate = ["--gate", "kl:below:1000"]
    assert_one_sentence(command("evaluate", quantized, *options, *gate, *SCORING, "--quiet"), 2, words)


def test_the_weights_of_the_dense_model_with_another_tokenizer_are_not_taken_for_it(
    command: Command, copy: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a gate on its answers would pass without a question being asked."""
    pytest.importorskip("lm_eval")
    unmeasured(monkeypatch)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    options = ["--suite", "quick", "--limit", "1", "--gate", "quick:not-worse:1pt"]
    ended = command("evaluate", copy, "--baseline", tiny, *SCORING, *options, "-q")
    assert_one_sentence(ended, 2, "has the weights of the dense model")


def test_an_evaluation_that_cannot_be_kept_is_shown(
    command: Command, quantized: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "compression.json")

    monkeypatch.setattr(compress.evaluation.evaluate, "measure", lambda *_, **__: None)
    monkeypatch.setattr(compress.evaluation.evaluate, "add_evaluations", refuse)
    ended = command("evaluate", quantized, "--baseline", tiny, *SCORING, "-q", "--json")
    assert ended.code == 0
    assert len(ended.document) == 2
    assert ended.err == f"The evaluation was not added to '{quantized}' (Read-only file system).\n"


def test_a_run_evaluates_its_own_result_against_the_revision_it_began_with(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch
):
    found = []
    for module in ("pipeline.plan", "evaluation.beforehand"):
        monkeypatch.setattr(f"compress.{module}.find_model", lambda *_: ModelSource("us/tiny", "abc", tiny))
    monkeypatch.setattr(
        "compress.evaluation.run.evaluate", lambda *args, **kwargs: found.append((args, kwargs))
    )
    (tmp_path / "recipe.yaml").write_text("{model: us/tiny, revision: abc, steps: [], evaluate: {}}")
    monkeypatch.chdir(tmp_path)
    assert command("run", "recipe.yaml", "-o", "demo").code == 0
    (((model,), options),) = found
    assert Path(model) == tmp_path / "demo"
    assert find_model(model).folder == tmp_path / "demo"  # and not the demo model
    assert (options["baseline"], options["baseline_revision"]) == ("us/tiny", "abc")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"text": "wikipdia"}, "did you mean 'wikipedia'"),
        ({"text": "nowhere/text.txt"}, "There is no file nowhere/text.txt"),
        ({"limit": 3}, "--limit needs questions"),
        ({"task_file": "nowhere.jsonl"}, "a task file scores encoders"),
        ({"text": "TEXT", "context": 16}, "The recipe calibrates on 1 of the documents that it evaluates"),
    ],
)
def test_an_evaluation_of_a_recipe_that_cannot_be_done_is_refused_before_the_run(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch, section: dict, words: str
):
    def refuse(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("compress.pipeline.run._carry_out", refuse)
    text = str(tiny.parent / "text.txt")
    section = {key: text if value == "TEXT" else value for key, value in section.items()}
    step = {"method": "awq", "group_size": 32}
    calibration = {"source": text, "nsamples": 2, "seqlen": 16}
    recipe = {"model": str(tiny), "steps": [step], "calibration": calibration, "evaluate": section}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ended = command("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--limit", "3"], ["--fewshot", "0"], ["--chat-template"], ["--samples", "x"]]
)
def test_options_of_questions_need_questions(command: Command, tiny: Path, words: list[str]):
    ended = command("evaluate", tiny, *words)
    assert_one_sentence(ended, 2, f"{words[0]} needs questions; name them with --suite or --tasks.")


@pytest.mark.parametrize("option", ["--judge", "--samples"])
def test_what_needs_answers_does_not_fall_back_to_text_alone(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch, option: str
):
    for module in ("ask", "cards"):
        monkeypatch.setattr(f"compress.evaluation.harness.{module}.installed", lambda: False)
    ended = command("evaluate", tiny, "--suite", "quick", option, tmp_path / "given")
    assert_one_sentence(ended, 1, "compress-model[eval]")


def test_every_command_that_opens_a_model_takes_its_revision(
    command: Command,
    tiny: Path,
    quantized: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = set()

    def find(name: str, revision: str | None = None) -> ModelSource:
        asked.add((name, revision))
        return ModelSource(name, revision, quantized if name == "us/small" else tiny)

    for module in ("sources.find", "evaluation.evaluate", "pipeline.plan"):
        monkeypatch.setattr(f"compress.{module}.find_model", find)
    monkeypatch.setattr(compress.evaluation.evaluate, "measure", lambda *_, **__: None)
    monkeypatch.setattr(compress.evaluation.evaluate, "add_evaluations", lambda *_: None)
    both = ["--baseline", "us/tiny", "--baseline-revision", "v0"]
    for words in (
        ["inspect", "us/tiny", "--revision", "v1"],
        ["plan", "us/tiny", recipe, "--revision", "v2"],
        ["run", recipe, "-m", "us/tiny", "--revision", "v3", "--dry-run"],
        ["quantize", "us/tiny", *RTN, "--revision", "v4", "--dry-run"],
        ["evaluate", "us/small", "--revision", "v5", *both, *SCORING],
    ):
        assert command(*words).code == 0
    assert asked == {("us/tiny", f"v{n}") for n in range(5)} | {("us/small", "v5")}


@pytest.mark.usefixtures("measured_here")
def test_an_evaluation_is_kept_and_shown(command: Command, tiny: Path, quantized: Path, tmp_path: Path):
    result = Path(shutil.copytree(quantized, tmp_path / "result"))
    ended = command("evaluate", result, "--baseline", tiny, *SCORING, "--json", tmp_path / "cards.json", "-q")
    assert (ended.code, ended.err) == (0, "")
    assert "top-1" in ended.out
    document = json.loads((tmp_path / "cards.json").read_text())
    kept = read_lineage(result).evaluations
    assert kept == document
    assert [card["model"]["name"] for card in kept] == ["tiny", "result"]
    fidelity, cost = kept[1]["fidelity"], kept[1]["cost"]
    assert fidelity["kl_mean"]["value"] > 0
    assert cost["measured"]["kernel"] != "torch"
    assert cost["weight_bytes"] == (result / "model.safetensors").stat().st_size

    card = (result / "README.md").read_text()
    markdown = command("compare", result, "--format", "markdown").out
    assert markdown.startswith("| model |")
    assert f"\n## Evaluation\n\n{markdown}\n## Limits\n" in card
    assert "| result |" in card

    from_file, from_folder = (
        list(csv.DictReader(command("compare", source, "--format", "csv").out.splitlines()))
        for source in (tmp_path / "cards.json", result)
    )
    assert [row.pop("made_by") for row in from_folder] == ["", "rtn"]  # only a folder knows
    assert from_file == from_folder
    assert len(from_file) == 2
    assert len(command("compare", result, "--json").document["rows"]) == 2
    assert command("compare", result, "-o", tmp_path / "table.txt") == Ended(0, "", "")
    assert "result" in (tmp_path / "table.txt").read_text()
    assert "2 evaluation(s) on record" in command("inspect", result).out
