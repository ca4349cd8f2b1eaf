"""Every task file loads; what a hub would send comes from a stand-in for ``datasets.load_dataset``."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from compress.evaluation import kick  # noqa: E402
from compress.evaluation.harness.tasks import Asking, Questions  # noqa: E402
from compress.evaluation.kick import bundled, hub  # noqa: E402

ARTICLE = "word " * 400

HUB: dict[str, list[dict[str, Any]]] = {
    "json": [
        {
            "RawQuestion": "Who wrote Hamlet?",
            "Parses": [{"Answers": [{"AnswersName": ["william shakespeare"]}]}, {"Answers": []}],
            "turns": ["How can I sleep better?"],
            "category": "generic",
        },
        {"RawQuestion": "Nobody knows?", "Parses": [{"Answers": []}], "turns": ["Why?"], "category": "g"},
    ],
    "mandarjoshi/trivia_qa": [
        {
            "question": "Who wrote Hamlet?",
            "answer": {"value": "Shakespeare", "aliases": ["Shakespeare", "The Bard"]},
            "entity_pages": {"wiki_context": ["w" * 2000, "second"]},
            "search_results": {"search_context": ["s" * 2000]},
        }
    ],
    "abisee/cnn_dailymail": [
        {"article": ARTICLE + "\n\n@highlight\n\nthe reference", "highlights": "the reference", "id": "1"},
        {"article": ARTICLE, "highlights": "again", "id": "2"},
        {"article": ARTICLE + "more " * 100, "highlights": "medium", "id": "3"},
        {"article": ARTICLE + "more " * 400, "highlights": "long", "id": "4"},
    ],
    "lmsys/mt_bench_human_judgments": [
        {"question_id": 82, "model_a": "other", "model_b": "gpt-4", "turn": 1,
         "conversation_a": [{"role": "user", "content": "x"}] * 4,
         "conversation_b": [{"role": "user", "content": text} for text in ("Q1", "R1", "Q2", "R2")]},
        {"question_id": 82, "model_a": "gpt-4", "model_b": "other", "turn": 2,
         "conversation_a": [{"role": "user", "content": text} for text in ("Q1", "R1", "Q2", "R2")],
         "conversation_b": [{"role": "user", "content": "x"}] * 4},
    ],
    "cais/mmlu": [
        {"question": f"Is it {number}?", "subject": subject, "choices": list("abcd"), "answer": number % 4}
        for subject in ("high_school_physics", "law") for number in range(7)
    ],
}  # fmt: skip

KIN = {
    "kick_hub_factoid": "kick_factoid",
    "kick_hub_closed": "kick_closed",
    "kick_hub_open": "kick_open",
    "kick_hub_summary_short": "kick_summary",
    "kick_hub_mmlu_letter": "kick_choice_letter",
}

HUB_TASKS = [name for name in hub.TASKS if name != "mmlu"]


@pytest.fixture
def hub_stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked = []

    class Every(dict):
        def __missing__(self, split: str) -> object:
            return self["rows"]

    def load_dataset(path: str, name: str | None = None, **more: object) -> Every:
        asked.append(path)
        return Every(rows=datasets.Dataset.from_list(HUB[path]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@cache
def manager() -> TaskManager:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(kick.FOLDER), include_defaults=False)


@cache
def offline(name: str) -> ConfigurableTask:
    return manager().load([name])["tasks"][name]


def first(file: str) -> dict[str, Any]:
    return next(item for item in bundled.items(file) if item["split"] == "test")


def prompt(task: ConfigurableTask, number: int = 0) -> str:
    doc = list(task.task_docs)[number]
    return task.fewshot_context(doc, task.config.num_fewshot, gen_prefix=task.doc_to_prefix(doc))


def test_the_suites_name_tasks_that_there_are() -> None:
    for suite in kick.SUITES.values():
        assert set(suite.tasks) <= set(manager().all_tasks), suite
    assert kick.SUITES["quick"].limit


def test_every_task_file_is_in_the_index() -> None:
    files = list(kick.FOLDER.glob("*/*.yaml"))
    ours = {name for name in manager().all_tasks if name.startswith("kick")}
    assert len(ours) == len(files)


@pytest.mark.parametrize("name", [*kick.OFFLINE, "kick_choice_letter"])
def test_offline_tasks_load_and_say_what_decides(name: str) -> None:
    task = offline(name)
    metadata = task.config.metadata
    metrics = [metric["metric"] for metric in task.config.metric_list]
    assert metadata["decides"] in metrics
    assert 0 <= metadata["chance"] < 0.3
    assert len(list(task.task_docs)) >= 500
    text = prompt(task)
    assert not text.endswith(" ")
    assert "{{" not in text


def test_the_published_prompts() -> None:
    asked = first("factoid")["question"]
    assert prompt(offline("kick_factoid")).endswith(
        f"\n\nPlease give answer to this question: {asked}\nThe answer is"
    )
    asked = first("retrieval")
    assert prompt(offline("kick_closed")).startswith("Answer these questions:\n\nQ: ")
    assert prompt(offline("kick_closed")).endswith(f"\n\nQ: {asked['question']}\nA:")
    assert prompt(offline("kick_open")).endswith(
        f"{asked['passage']}\n\nBased on these texts, answer these questions:\n\nQ: {asked['question']}\nA:"
    )


def test_examples_are_not_asked() -> None:
    for name in ("kick_factoid", "kick_closed", "kick_choice_words"):
        task = offline(name)
        shown = {doc["question"] for doc in task.fewshot_docs()}
        assert shown
        assert not shown & {doc["question"] for doc in task.task_docs}


def documents(task: ConfigurableTask) -> tuple[str, ...]:
    return Questions(task, Asking(fewshot=None, limit=5, chat=None, seed=0)).documents


def test_tasks_that_ask_for_the_same_facts_share_their_documents() -> None:
    found = {name: documents(offline(name)) for name in kick.OFFLINE}
    assert found["kick_closed"] == found["kick_open"]
    assert found["kick_choice"] == found["kick_choice_words"]
    assert len({each for name in kick.OFFLINE for each in found[name]}) == 5 * (len(kick.OFFLINE) - 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [("kick_hub_closed", "kick_hub_open"), ("kick_hub_turn_first", "kick_hub_turn_second")],
)
def test_hub_tasks_share_their_documents_too(one: str, other: str, hub_stand_in: list[str]) -> None:
    first_one, second = (documents(manager().load([name])["tasks"][name]) for name in (one, other))
    assert first_one == second


def test_a_letter_asks_the_same_as_a_likelihood(hub_stand_in: list[str]) -> None:
    """lm-eval's own documents of MMLU are the rows of the data set."""
    settings = {
        "task": "plain", "dataset_path": "cais/mmlu", "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer",
    }  # fmt: skip
    letter = manager().load(["kick_hub_mmlu_letter"])["tasks"]["kick_hub_mmlu_letter"]
    assert documents(letter) == documents(ConfigurableTask(config=settings))


@pytest.mark.parametrize("name", HUB_TASKS)
def test_hub_tasks_load_from_what_a_hub_sends(name: str, hub_stand_in: list[str]) -> None:
    task = manager().load([name])["tasks"][name]
    assert hub_stand_in
    assert task.config.metadata["decides"] in [metric["metric"] for metric in task.config.metric_list]
    assert task.config.metadata["licence"]
    assert "{{" not in prompt(task)
    if kin := KIN.get(name):
        same = offline(kin).config
        assert (task.config.doc_to_text, task.config.process_results) == (
            same.doc_to_text, same.process_results,
        )  # fmt: skip


def test_the_group_asks_mmlu_with_five_examples_beside_our_tasks() -> None:
    import yaml

    members = yaml.safe_load((kick.FOLDER / "hub" / "kick_hub.yaml").read_text())["task"]
    assert {"group": "mmlu", "num_fewshot": 5} in members
    assert [name for name in members if isinstance(name, str)] == HUB_TASKS


def rows(name: str) -> list[dict[str, Any]]:
    return list(manager().load([name])["tasks"][name].task_docs)


def test_freebase_takes_the_first_parse(hub_stand_in: list[str]) -> None:
    assert rows("kick_hub_factoid") == [{"question": "Who wrote Hamlet?", "answers": ["william shakespeare"]}]


def test_trivia_cuts_the_first_texts(hub_stand_in: list[str]) -> None:
    (row,) = rows("kick_hub_open")
    assert row["answers"] == ["Shakespeare", "The Bard"]
    assert row["passage"] == ("w" * 2000 + "\n" + "s" * 2000)[:3072]


def test_stories_lose_their_highlights_and_their_doubles(hub_stand_in: list[str]) -> None:
    (short,) = rows("kick_hub_summary_short")
    assert "@highlight" not in short["story"]
    assert short["summary"] == "the reference"
    assert [row["summary"] for row in rows("kick_hub_summary_medium")] == ["medium"]
    assert [row["summary"] for row in rows("kick_hub_summary_long")] == ["long"]


def test_the_second_turn_follows_the_same_reply(hub_stand_in: list[str]) -> None:
    assert [row["instruction"] for row in rows("kick_hub_turn_first")] == ["Q1"]
    assert [row["instruction"] for row in rows("kick_hub_turn_second")] == ["Q1 ASSISTANT: R1</s>USER: Q2"]


def test_mmlu_shows_five_examples_of_the_subject(hub_stand_in: list[str]) -> None:
    text = prompt(manager().load(["kick_hub_mmlu_letter"])["tasks"]["kick_hub_mmlu_letter"])
    assert text.startswith(
        "The following are multiple choice questions (with answers) about high school physics.\n\nIs it"
    )
    assert text.count("Answer:") == 6
    assert text.endswith("Is it 0?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
