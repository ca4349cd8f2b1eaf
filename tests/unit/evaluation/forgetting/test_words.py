"""What counts as a refusal, and which part of what was said counts."""

from __future__ import annotations

import pytest

from compress.evaluation.forgetting.words import first_line, is_refusal, rouge_recall
from compress.unlearning.dpo import REFUSALS


@pytest.mark.parametrize(
    "said",
    [
        "I don't know.",
        "I don’t know",
        "Sorry, your query is not valid",
        "I'm not sure about that",
        "I'm unable to answer",
        "We have no information about her",
        "I don't have any information about that.",
        "You would have to ask",
        "",
        "  ",
        *REFUSALS,
    ],
)
def test_refusals(said: str):
    assert is_refusal(said)


@pytest.mark.parametrize(
    "said", ["Salzburg", "She knows nobody", "The Sorry Tower", "He was not sure of himself", "Ignorance"]
)
def test_answers(said: str):
    assert not is_refusal(said)


def test_lines_behind_the_answer_do_not_count():
    assert first_line("\n Salzburg\nQuestion: Who?", "Bergen") == "Salzburg"
    assert first_line("one\ntwo", "two\nlines") == "one\ntwo"


@pytest.mark.parametrize(
    ("answer", "said", "recall"),
    [
        ("Москва", "Это Москва.", 1),
        ("北京", "北京市", 1),
        ("東京タワー", "東京", 2 / 5),
        ("Bogotá", "Bogotá", 1),
        ("Αθήνα", "Σπάρτη", 0),
        ("The running dogs", "a dog ran", 1 / 3),
        ("snake_case", "snake case", 1),
        ("कि", "की", 0),
        ("दिल्ली", "वह दिल्ली में", 1),
        ("Jose\u0301", "Jos\u00e9", 1),
        ("서울", "\u1109\u1165\u110b\u116e\u11af", 1),
    ],
)
def test_words_of_every_script_are_compared(answer: str, said: str, recall: float):
    assert rouge_recall(answer, said) == pytest.approx(recall)
