"""Every bundled question is well-formed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache
from importlib import resources

import pytest

from compress.calibration.text.corpora import factbook
from compress.calibration.text.sources import read_documents
from compress.evaluation.kick import bundled, scorers

FILES = ("factoid", "choice", "retrieval", "summary", "instruct")
FACTS = ("factoid", "choice", "retrieval")


@cache
def items(task: str) -> list[dict]:
    return bundled.items(task)


def mentions(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def test_the_files_are_those_of_their_list_and_small() -> None:
    folder = resources.files("compress.evaluation.kick").joinpath("data")
    about = json.loads(bundled._file("about.json"))
    assert set(about["files"]) == {f"{task}.jsonl.gz" for task in FILES}
    for name, facts in about["files"].items():
        content = folder.joinpath(name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
        assert len(content) < 400_000
    assert all(source["licence"] for source in about["sources"].values())
    assert "Princeton University" in folder.joinpath("LICENSE").read_text()


@pytest.mark.parametrize("task", FILES)
def test_there_are_500_questions_and_each_is_asked_once(task: str) -> None:
    tests = [item for item in items(task) if item["split"] == "test"]
    assert len(tests) >= 500
    key = {"summary": "story", "instruct": "instruction"}.get(task, "question")
    assert len({item[key] for item in items(task)}) == len(items(task))
    assert len({item["id"] for item in items(task)}) == len(items(task))


def test_no_question_is_in_two_files() -> None:
    often = Counter(item["question"] for task in FACTS for item in items(task))
    assert set(often.values()) == {1}


@pytest.mark.parametrize("task", FACTS)
def test_no_question_tells_its_answer(task: str) -> None:
    told = [item for item in items(task) for answer in item["answers"] if mentions(item["question"], answer)]
    assert told == []


@pytest.mark.parametrize("task", FACTS)
def test_every_answer_is_right_for_the_scorers(task: str) -> None:
    for item in items(task):
        for answer in item["answers"]:
            assert scorers.factoid(item, [f" {answer}"])["exact_match"] == 1, item


def test_choices_are_four_different_ones_of_one_type() -> None:
    known: dict[str, set[str]] = {}
    for task in FACTS:
        for item in items(task):
            known.setdefault(item["relation"], set()).update(item["answers"])
    for item in items("choice"):
        choices = [choice.lower() for choice in item["choices"]]
        assert len(set(choices)) == 4
        assert item["choices"][item["answer"]] == item["answers"][0]
        wrong = set(choices) - {item["answers"][0].lower()}
        assert not wrong & {answer.lower() for answer in item["answers"]}, item
        assert not any(mentions(item["question"], choice) for choice in choices), item


def test_the_right_choice_is_at_every_place() -> None:
    places = Counter(item["answer"] for item in items("choice"))
    assert min(places.values()) > 0.8 * len(items("choice")) / 4


def test_passages_hold_the_answer_once_among_distractors() -> None:
    for item in items("retrieval"):
        assert any(mentions(item["passage"], answer) for answer in item["answers"]), item
        assert item["passage"].count(".") >= 4, item


def test_stories_do_not_hold_their_summary() -> None:
    for item in items("summary"):
        assert item["summary"] not in item["story"]
        assert 10 <= len(item["summary"].split()) <= 40
        assert 30 <= len(item["story"].split()) <= 160


def test_stories_are_of_countries_held_out_of_calibration() -> None:
    calibration = "\n".join(factbook("calibration"))
    for item in items("summary"):
        assert item["summary"] not in calibration
        assert item["story"].partition(". ")[2] not in calibration


@pytest.mark.parametrize("task", FACTS)
def test_the_calibration_text_tells_no_fact(task: str) -> None:
    """No paragraph of ``bundled`` holds a name asked about together with the answer."""
    paragraphs = [
        f"{document.partition(chr(10))[0]}. {paragraph}".lower()
        for document in factbook("calibration")
        for paragraph in document.split("\n\n")[1:]
    ]
    for item in items(task):
        for paragraph in paragraphs:
            if item["subject"].lower() in paragraph and mentions(paragraph, item["subject"]):
                assert not any(mentions(paragraph, answer) for answer in item["answers"]), item


@pytest.mark.parametrize("task", FACTS)
def test_no_answer_is_right_often(task: str) -> None:
    tests = [item for item in items(task) if item["split"] == "test"]
    often = Counter(answer.lower() for item in tests for answer in item["answers"])
    assert often.most_common(1)[0][1] < 0.06 * len(tests)


def test_the_documents_are_those_of_the_evaluation_half() -> None:
    """So that a model calibrated on them can be refused, and one calibrated on ``bundled`` need not be."""
    assert len(bundled.told_by("kick_summary")) == len(factbook("evaluation"))
    assert not bundled.told_by("kick_summary") & set(read_documents("bundled").hashes)
    assert not bundled.told_by("kick_closed")
