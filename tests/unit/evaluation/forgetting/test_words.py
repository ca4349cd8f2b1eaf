"""What counts as a refusal, and which part of what was said counts."""

from __future__ import annotations

import pytest

from compress.evaluation.forgetting.words import first_line, is_refusal


@pytest.mark.parametrize(
    "said",
    [
        "I don't know.",
        "I don’t know",
        "Sorry, your query is not valid",
        "I'm not sure about that",
        "I'm unable to answer",
        "We have no information about her",
        "",
        "  ",
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
