"""What a task calls chance is no less than what the best answer gets that is the same for every question."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import yaml

pytest.importorskip("rouge_score")

from compress.evaluation import kick
from compress.evaluation.kick import bundled, scorers

Score = Callable[[dict[str, Any], Sequence[str]], dict[str, float]]


WORDS = "government president country court election law economy sector"


def asked(file: str) -> list[dict[str, Any]]:
    return [item for item in bundled.items(file) if item["split"] == "test"]


def chance(task: str) -> float:
    text = (kick.FOLDER / "kick" / f"{task}.yaml").read_text().replace("!function ", "")
    return float(yaml.safe_load(text)["metadata"]["chance"])


def best(answers: Iterable[str], docs: list[dict[str, Any]], score: Score, metric: str) -> float:
    return max(sum(score(doc, [answer])[metric] for doc in docs) / len(docs) for answer in answers)


@pytest.mark.parametrize(
    ("task", "file"), [("factoid", "factoid"), ("closed", "retrieval"), ("open", "retrieval")]
)
def test_short_answers(task: str, file: str) -> None:
    docs = asked(file)
    often = Counter(answer for doc in docs for answer in doc["answers"])
    usual = [answer for answer, _ in often.most_common(20)]
    assert best(usual, docs, scorers.factoid, "exact_match") <= chance(task)


def test_instructions() -> None:
    docs = [doc | {"arguments": json.dumps(doc["arguments"])} for doc in asked("instruct")]
    guesses = [doc["follows"] for doc in docs[:100]] + ["today it rains, thank you for reading", "yes", "no"]
    assert best(guesses, docs, scorers.instruction, "follows") <= chance("instruct")


def test_summaries() -> None:
    docs = asked("summary")[:60]
    guesses = [doc["summary"] for doc in asked("summary")[60:80]] + ["the of and to in a " * 4, WORDS]
    assert best(guesses, docs, scorers.summary, "content") <= chance("summary")


def test_choices() -> None:
    for place in range(4):
        assert sum(doc["answer"] == place for doc in asked("choice")) / len(asked("choice")) <= 0.28
