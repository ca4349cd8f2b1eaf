"""Models are asked as lm-eval asks them, each task once, and no answer is ever another model's."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

import compress
from compress.engine.opening import open_checkpoint
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput, CompressError
from compress.evaluation.harness import ask as asking
from compress.evaluation.harness import tasks as finding
from compress.evaluation.harness.ask import Respondent, Wanted, ask
from compress.evaluation.harness.prefix import Prefix
from compress.evaluation.harness.subject import Subject
from compress.evaluation.pairs import alone, judge
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

from .conftest import LINES, MEAN, TASKS, subject, write_task


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that a model was asked, and not its cache."""
    asked: list[str] = []
    real = Respondent.rows

    def rows(self: Respondent, questions: Any) -> Any:
        asked.append(questions.name)
        return real(self, questions)

    monkeypatch.setattr(Respondent, "rows", rows)
    return asked


def lm_eval_samples(folder: Path, tasks: Path) -> dict[str, list[dict]]:
    """What lm-eval's own model, loaded as its command line loads it, answers with one row in a batch."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    with asking.quietly():
        found: Any = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return found["samples"]


def test_the_answers_are_those_of_lm_eval(model: Path, tasks: Path, tmp_path: Path):
    """Every kind of request; the same scores and texts for each question, and likelihoods to six digits."""
    expected = lm_eval_samples(model, tasks)
    found = ask(subject(model), Wanted(tuple(TASKS), (tasks,)), samples=tmp_path / "samples")
    assert [answers.asked.task for answers in found] == list(TASKS)
    for answers in found:
        samples = expected[answers.asked.task]
        file = tmp_path / "samples" / model.name / f"{answers.asked.task}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == len(samples) == len(LINES)
        for row, sample in zip(rows, samples, strict=True):
            assert row["doc"] == sample["doc"]
            for own, its in zip(row["responses"], sample["filtered_resps"], strict=True):
                if isinstance(its, str):
                    assert own == its
                else:
                    np.testing.assert_allclose(own, its, rtol=1e-6)
            for metric in ("acc", "acc_norm", "exact_match"):
                assert row["scores"].get(metric) == sample.get(metric)
    choice, say, last_word, prose = found
    assert choice.asked.chance == pytest.approx(np.mean([1 / len(line["choices"]) for line in LINES]))
    assert choice.scores.tolist() == [sample["acc"] for sample in expected["choice"]]
    assert last_word.asked.metric == "acc"
    assert len(set(say.text)) > 3
    totals = [sample["word_perplexity"] for sample in expected["prose"]]
    np.testing.assert_allclose(prose.scores, [np.exp(ll / words) for ll, words in totals], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_answers_do_not_depend_on_the_batch_size(
    model: Path, tasks: Path, size: int, tmp_path: Path, monkeypatch
):
    wanted = Wanted(tuple(TASKS), (tasks,))
    usual = ask(subject(model), wanted)
    monkeypatch.setattr("compress.evaluation.harness.cache.cache_folder", lambda: tmp_path / "other")
    for answers, again in zip(
        usual, ask(subject(model), Wanted(tuple(TASKS), (tasks,), batch_size=size)), strict=True
    ):
        assert answers.asked == again.asked
        assert answers.questions == again.questions
        if answers.asked.task in ("choice", "say"):
            assert answers.text == again.text
        np.testing.assert_allclose(answers.scores, again.scores, rtol=1e-5)


def test_a_row_of_a_batch_ends_at_the_end_of_text(
    tasks: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where the settings of the model name no end, so that the batch goes on for other rows."""
    copy = Path(shutil.copytree(model, tmp_path / "endless"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    question = f"Question: {LINES[0]['question']}\nAnswer:"
    prompt = load_tokenizer(model)(question, return_tensors="pt").input_ids
    with torch.inference_mode():
        said = compress.load(model).generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    weights["lm_head.weight"][0] = 1.01 * weights["lm_head.weight"][said[0, -1]]  # the end in its place
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (one,) = ask(subject(copy), Wanted(("say",), (tasks,), batch_size=1))
    monkeypatch.setattr("compress.evaluation.harness.cache.cache_folder", lambda: tmp_path / "other")
    (many,) = ask(subject(copy), Wanted(("say",), (tasks,), batch_size=16))
    assert one.text == many.text
    assert len(load_tokenizer(model)(one.text[0]).input_ids) < 12


def test_nothing_is_asked_twice(model: Path, tasks: Path, count: list[str]):
    wanted = Wanted(("both", "prose"), (tasks,))
    first = ask(subject(model), wanted)
    assert count == ["choice", "say", "prose"]
    again = ask(subject(model), wanted)
    assert count == ["choice", "say", "prose"]
    for one, other in zip(first, again, strict=True):
        assert one.asked == other.asked
        assert one.text == other.text
        np.testing.assert_array_equal(one.scores, other.scores)
    ask(subject(model), Wanted(("say",), (tasks,), limit=5))
    ask(subject(model, kernel="reference", dtype="bfloat16"), Wanted(("say",), (tasks,)))
    assert count[3:] == ["say", "say"]


def test_an_interrupted_evaluation_goes_on_where_it_was(
    model: Path, tasks: Path, count: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Finished tasks are not asked again, and of the others only the questions without an answer."""
    monkeypatch.setattr("compress.evaluation.harness.cache.FLUSH_SECONDS", 0.0)
    calls: list[int] = []

    def interrupt(text: str, share: float) -> None:
        if text.endswith("say") and share > 0.4:
            raise KeyboardInterrupt

    wanted = Wanted(("choice", "say"), (tasks,), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        ask(subject(model), wanted, progress=interrupt)
    assert count == ["choice", "say"]
    from lm_eval.models.huggingface import HFLM

    real = HFLM.generate_until
    monkeypatch.setattr(
        HFLM,
        "generate_until",
        lambda self, requests, **k: calls.append(len(requests)) or real(self, requests, **k),
    )
    resumed = ask(subject(model), wanted)
    assert count == ["choice", "say", "say"]
    assert 0 < calls[0] < len(LINES)
    monkeypatch.undo()
    assert resumed[1].text == ask(subject(model), Wanted(("say",), (tasks,), seed=1))[0].text


def test_swapped_caches_are_of_no_use(
    model: Path, tasks: Path, tmp_path: Path, count: list[str], monkeypatch
):
    """Whatever lies in a model's folder of the cache, only its own answers are taken from it."""
    other = tmp_path / "other"
    execute(
        parse_recipe({"model": str(model), "steps": [{"method": "rtn", "bits": 2, "group_size": 32}]}), other
    )
    wanted = Wanted(("choice", "say"), (tasks,))
    first, second = ask(subject(model), wanted), ask(subject(other), wanted)
    assert first[1].text != second[1].text
    one, two = (tmp_path / "cache" / "harness" / open_checkpoint(x).sha256[:32] for x in (model, other))
    names = {folder: sorted(file.name for file in folder.iterdir()) for folder in (one, two)}
    one.rename(tmp_path / "swap")
    two.rename(one)
    (tmp_path / "swap").rename(two)
    for folder, mine in ((one, names[one]), (two, names[two])):  # and under the names that are looked for
        for file, name in zip(sorted(folder.iterdir()), mine, strict=True):
            file.rename(folder / name)
    count.clear()
    assert [each.text for each in ask(subject(model), wanted)] == [each.text for each in first]
    assert [each.text for each in ask(subject(other), wanted)] == [each.text for each in second]
    assert count == ["choice", "say"] * 2


def test_packed_models_run_on_their_kernels(model: Path, tasks: Path, tmp_path: Path):
    folder = tmp_path / "packed"
    execute(parse_recipe({"model": str(model), "steps": [{"method": "rtn", "group_size": 32}]}), folder)
    wanted = Wanted(("choice", "say"), (tasks,))
    native, reference = (ask(subject(folder, kernel=kernel), wanted) for kernel in ("auto", "reference"))
    for one, other in zip(native, reference, strict=True):
        assert one.text == other.text
        assert (one.scores == other.scores).all()
    identities = [subject(folder, kernel=kernel).identity for kernel in ("auto", "reference")]
    assert identities[0] == identities[1] or identities[0]["kernel"] != identities[1]["kernel"]


def test_a_shared_beginning_is_read_once(model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    used = []
    real = Prefix.put_first
    monkeypatch.setattr(Prefix, "put_first", lambda *args: used.append(real(*args)) or used[-1])
    ask(subject(model), Wanted(("say",), (tasks,), batch_size=4))
    assert len(used) == len(LINES) // 4
    assert all(used)


def test_no_network_is_tried(model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(ask(subject(model), Wanted(("both",), (tasks,)))) == 2


@pytest.mark.parametrize(
    ("settings", "lines", "kind", "words"),
    [
        (
            {},
            [LINES[0], {**LINES[0], "label": 7}],
            BadInput,
            "Question 2 of the task 'broken' has the label 7, which is none",
        ),
        (
            {},
            [LINES[0], {**LINES[0], "label": -1}],
            BadInput,
            "Question 2 of the task 'broken' has the label '-1'",
        ),
        (
            {"dataset_path": "nobody/nothing"},
            LINES,
            CompressError,
            "data of the task 'broken' cannot be fetched",
        ),
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            LINES,
            CompressError,
            "cannot be fetched",
        ),
        (
            {"doc_to_text": "{{question"},
            LINES,
            BadInput,
            "The task 'broken' cannot be set up (TemplateSyntaxError",
        ),
        (
            {"num_fewshot": 100},
            LINES,
            BadInput,
            "The questions of the task 'broken' cannot be built (ValueError",
        ),
        (
            {},
            [LINES[0], {**LINES[0], "choices": None}],
            BadInput,
            "The questions of the task 'broken' cannot be built (TypeError",
        ),
        ({"output_type": "song"}, LINES, BadInput, "The task 'broken' cannot be set up (ValueError"),
        ({"unsafe_code": True}, LINES, BadInput, "runs code that models write"),
        (
            {"metadata": {"decides": "taste"}},
            LINES,
            BadInput,
            "no metric that scores each question between 0 and 1 and",
        ),
        ({}, [{**LINES[0], "label": 7}], BadInput, "the label of its first question"),
    ],
)
def test_a_task_that_does_not_work_gets_one_sentence(
    model: Path, tasks: Path, settings: dict, lines: list[dict], kind: type, words: str, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_task(tasks, "broken", lines, **{**TASKS["choice"], **settings})
    with pytest.raises(CompressError) as raised:
        ask(subject(model), Wanted(("broken",), (tasks,)))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scorer_that_fails_is_not_an_internal_error(model: Path, tasks: Path):
    file = write_task(tasks, "broken", **TASKS["choice"])
    (tasks / "scorer.py").write_text("def score(doc, results):\n    return {'acc': doc['nothing']}\n")
    file.write_text(file.read_text() + "process_results: !function scorer.score\n")
    with pytest.raises(CompressError, match=r"Asking the task 'broken' failed \(KeyError: 'nothing'\)"):
        ask(subject(model), Wanted(("broken",), (tasks,)))


def test_a_changed_scorer_is_asked_again(model: Path, tasks: Path, count: list[str]):
    file = write_task(tasks, "own", **TASKS["choice"])
    file.write_text(file.read_text() + "process_results: !function scorer.score\n")
    for value in (0, 1, 1):
        code = f"def value():\n    return {value}\n\n"
        code += "def score(doc, results):\n    return {'acc': value()}\n"
        (tasks / "scorer.py").write_text(code)
        assert ask(subject(model), Wanted(("own",), (tasks,)))[0].scores.tolist() == [value] * len(LINES)
    assert count == ["own", "own"]


def test_a_scorer_whose_rules_changed_is_asked_again(
    model: Path, tasks: Path, tmp_path: Path, count: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A scorer of a package is more than its own file: that of kick_instruct has its rules beside it."""
    package = tmp_path / "lib" / "of_scorers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "scorer.py").write_text(
        "from of_scorers import rules\n\n"
        "def score(doc, results):\n    return {'acc': float(rules.follows())}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "lib")
    file = write_task(tasks, "own", **TASKS["choice"])
    file.write_text(file.read_text() + "process_results: !function of_scorers.scorer.score\n")
    for value in (0, 1, 1):
        (package / "rules.py").write_text(f"def follows():\n    return {value}  #{' ' * value}\n")
        for name in ("of_scorers", "of_scorers.scorer", "of_scorers.rules"):
            sys.modules.pop(name, None)
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        assert ask(subject(model), Wanted(("own",), (tasks,)))[0].scores.tolist() == [value] * len(LINES)
    assert count == ["own", "own"]


def test_another_lm_eval_is_asked_every_question_again(
    model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    from lm_eval.models.huggingface import HFLM

    asked: list[int] = []
    real = HFLM.generate_until
    monkeypatch.setattr(
        HFLM,
        "generate_until",
        lambda self, requests, **k: asked.append(len(requests)) or real(self, requests, **k),
    )
    ask(subject(model), Wanted(("say",), (tasks,)))
    monkeypatch.setattr("compress.evaluation.harness.ask.version", lambda name: "99")
    ask(subject(model), Wanted(("say",), (tasks,)))
    assert asked == [len(LINES)] * 2


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_library_is_asked_again(
    model: Path, tasks: Path, count: list[str], library: str, monkeypatch: pytest.MonkeyPatch
):
    """Else a dense model would be asked by one version, and what is compared with it by the next."""
    ask(subject(model), Wanted(("choice",), (tasks,)))
    monkeypatch.setattr(
        "compress.evaluation.harness.subject.version", lambda name: "99" if name == library else version(name)
    )
    ask(subject(model), Wanted(("choice",), (tasks,)))
    assert count == ["choice", "choice"]


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model", "tekken.json"])
def test_every_file_of_a_tokenizer_counts(model: Path, tasks: Path, tmp_path: Path, name: str):
    copy = Path(shutil.copytree(model, tmp_path / "words"))
    found = []
    for content in ("one", "other"):
        (copy / name).write_text(content)
        found.append(subject(copy).identity)
    assert found[0] != found[1]


def test_choices_are_counted_once_where_they_are_asked_without_a_question_too(model: Path, tasks: Path):
    """For mutual information, lm-eval asks each choice twice."""
    metrics = [*TASKS["choice"]["metric_list"], {"metric": "acc_mutual_info", **MEAN}]
    write_task(tasks, "mutual", **TASKS["choice"] | {"metric_list": metrics})
    wanted = Wanted(("choice", "mutual"), (tasks,))
    plain, mutual = ask(subject(model), wanted)
    assert mutual.asked.chance == plain.asked.chance
    assert mutual.text == plain.text
    assert "acc_mutual_info" in mutual.others


def test_prompts_that_do_not_fit_are_cut_and_counted(model: Path, tasks: Path):
    """The model takes 256 tokens; an answer to 'say' has up to 12, and texts are cut into windows."""
    lines = [{**line, "question": "a" * 225 + "b" * number} for number, line in enumerate(LINES[:10])]
    lines += [{**line, "text": "long " * 100} for line in LINES[10:]]
    for name in ("choice", "say", "prose"):
        write_task(tasks, name, lines, **TASKS[name])
    found = ask(subject(model), Wanted(("choice", "say", "prose"), (tasks,)))
    tokens = [len("Question: \nAnswer:" + line["question"]) for line in lines]
    said = [max(len(f" {choice}") for choice in line["choices"]) for line in lines]
    cut = sum(length + more > 257 for length, more in zip(tokens, said, strict=True))
    assert 0 < cut < 10
    assert [each.cut for each in found] == [cut, sum(length > 256 - 12 for length in tokens), 0]
    words = f"The beginning of {cut} of the 12 questions of 'choice' was cut off"
    for harness in (alone(found), judge(found, found, 0.01, 0)):
        assert any(text.startswith(words) for text in harness.warnings)
    again = ask(subject(model), Wanted(("choice",), (tasks,)))
    assert again[0].cut == cut


def test_a_metric_that_is_better_the_lower_it_is_does_not_decide(model: Path, tasks: Path):
    metrics = [{"metric": "wrong", "aggregation": "mean", "higher_is_better": False}]
    settings = TASKS["choice"] | {"metric_list": metrics, "metadata": {"decides": "wrong"}}
    file = write_task(tasks, "own", **settings)
    file.write_text(file.read_text() + "process_results: !function scorer.score\n")
    (tasks / "scorer.py").write_text("def score(doc, results):\n    return {'wrong': 1.0}\n")
    with pytest.raises(BadInput, match=r"no metric that .* better the larger .* is named wrong"):
        ask(subject(model), Wanted(("own",), (tasks,)))


def test_unknown_tasks_and_broken_files_are_named(model: Path, tasks: Path, monkeypatch):
    """Without the tasks that come with lm-eval, which take seconds to list."""
    monkeypatch.setattr(
        finding, "TaskManager", lambda **settings: TaskManager(**{**settings, "include_defaults": False})
    )

    def refused(name: str) -> str:
        with pytest.raises(BadInput) as raised:
            ask(subject(model), Wanted((name,), (tasks,)))
        return str(raised.value)

    assert refused("last_wort") == "There is no task 'last_wort'; did you mean 'last_word'?"
    (tasks / "bad.yaml").write_text("task: bad\n  dataset_path: [json")
    assert refused("bad").startswith(f"The task file '{tasks / 'bad.yaml'}' cannot be read (")
    assert refused(str(tasks / "bad.yaml")).startswith(
        f"The task file '{tasks / 'bad.yaml'}' cannot be read ("
    )
    with pytest.raises(BadInput, match="There is no folder"):
        ask(subject(model), Wanted(("choice",), (tasks / "no",)))


def test_a_cache_that_cannot_be_written_is_an_error(
    model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    import sqlite3

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("compress.evaluation.harness.cache.Requests._insert", full)
    with pytest.raises(
        CompressError, match=r"cannot be written \(database or disk is full\); free some space"
    ):
        ask(subject(model), Wanted(("choice",), (tasks,)))


def test_other_models_of_transformers_can_be_asked(
    tiny_decoder: Callable[..., Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder that this tool cannot read is loaded by transformers, but not if weights are missing."""
    from safetensors.torch import load_file, save_file

    from compress.evaluation.foreign import Foreign, open_any

    folder = tiny_decoder(
        "GPTNeoForCausalLM", num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4
    )
    opened = open_any(folder)
    assert isinstance(opened, Foreign)
    weights = load_file(folder / "model.safetensors")
    assert opened.parameters == sum(w.numel() for w in weights.values())
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")  # that nothing loads
    assert open_any(folder).sha256 == opened.sha256
    assert open_any(folder).files == [folder / "model.safetensors"]
    expected = lm_eval_samples(folder, tasks)
    (say,) = ask(Subject("other", opened), Wanted(("say",), (tasks,)))
    assert list(say.text) == [sample["filtered_resps"][0] for sample in expected["say"]]
    del weights["transformer.h.1.ln_1.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"transformers cannot load it either \(its files lack 1 weights"):
        ask(Subject("other", open_any(folder)), Wanted(("say",), (tasks,)))
