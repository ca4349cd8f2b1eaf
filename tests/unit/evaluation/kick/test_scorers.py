"""Scores of completions worked out by hand; among them every defect of the published scripts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.evaluation.kick import scorers

CAPITAL = {"question": "What is the capital of France?", "answers": ["Paris"]}
CHOICE = {"choices": ["dog", "cat", "sea horse", "horse"], "answer": 3}


@pytest.mark.parametrize(
    ("said", "exact", "contains"),
    [
        (" Paris", 1, 1),
        (" paris.\n\nQ: more", 1, 1),
        ("\n\nThe Paris!", 1, 1),
        (" Paris, which lies on the Seine", 0, 1),
        (" Parisian", 0, 0),
        (" Lyon\nParis", 0, 0),
        ("", 0, 0),
        (" .", 0, 0),
    ],
)
def test_short_answers(said: str, exact: int, contains: int) -> None:
    found = scorers.factoid(CAPITAL, [said])
    assert (found["exact_match"], found["contains"]) == (exact, contains)


def test_a_question_that_holds_its_answer_counts_in_legacy_only() -> None:
    doc = {"question": "Who wrote the song Hey Jude of The Beatles?", "answers": ["the beatles"]}
    assert scorers.factoid(doc, [" no idea"]) == {"exact_match": 0, "contains": 0, "legacy": 1}


def test_legacy_ignores_spaces() -> None:
    doc = {"question": "Which city?", "answers": ["New York"]}
    assert scorers.factoid(doc, [" newyork"])["legacy"] == 1
    assert scorers.factoid(doc, [" newyork"])["contains"] == 0


def test_an_empty_answer_counts_in_legacy_only() -> None:
    assert scorers.retrieval(CAPITAL, [" \n"]) == {"exact_match": 0, "contains": 0, "f1": 0, "legacy": 1}


def test_part_of_an_answer_counts_in_legacy_only() -> None:
    doc = {"question": "Who?", "answers": ["Abraham Lincoln"]}
    found = scorers.retrieval(doc, [" Lincoln"])
    assert found == {"exact_match": 0, "contains": 0, "f1": pytest.approx(2 / 3), "legacy": 1}


def test_f1_is_the_best_over_the_answers() -> None:
    doc = {"question": "Who?", "answers": ["Lincoln", "president Abraham Lincoln"]}
    assert scorers.retrieval(doc, [" Abraham Lincoln"])["f1"] == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize(
    ("said", "exact", "answered", "legacy"),
    [
        (" B", 1, 1, 1),
        ("(B)", 1, 1, 0),
        (" B.", 1, 1, 0),
        (" A", 0, 1, 0),
        (" Because", 0, 0, 0),
        (" the B", 0, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_letters(said: str, exact: int, answered: int, legacy: int) -> None:
    assert scorers.letter({"answer": 1}, [said]) == {
        "exact_match": exact,
        "answered": answered,
        "legacy": legacy,
    }


@pytest.mark.parametrize(
    ("said", "exact", "contains", "answered"),
    [
        (" horse", 1, 1, 1),
        (" a horse.", 1, 1, 1),
        (" it is a horse", 0, 1, 0),
        (" dog", 0, 0, 1),
        (" dog or horse", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_choices_in_words(said: str, exact: int, contains: int, answered: int) -> None:
    assert scorers.choice(CHOICE, [said]) == {
        "exact_match": exact,
        "contains": contains,
        "answered": answered,
    }


def test_a_summary() -> None:
    doc = {"summary": "The dog ran home.", "words": 4}
    same = scorers.summary(doc, [" the dogs ran home "])
    assert (same["rouge1"], same["rouge2"], same["rougeL"]) == (1, 1, 1)  # stemmed
    assert same["obeys"] == 0  # four words are not less than four
    assert scorers.summary(doc, ["home ran"])["rouge1"] == pytest.approx(2 * 2 / 6)
    assert scorers.summary(doc, ["home ran"])["rougeL"] == pytest.approx(2 * 1 / 6)


def test_an_empty_summary_is_worth_nothing() -> None:
    found = scorers.summary({"summary": "The dog ran home.", "words": 4}, [" \n"])
    assert set(found.values()) == {0}


def test_repetition() -> None:
    assert scorers.distinct("a b c d") == 1
    assert scorers.distinct("go on go on go on") == 2 / 4
    assert scorers.distinct("the the the the the") == 1 / 3
    assert scorers.distinct("") == 0
    assert scorers.open_ended({}, ["the " * 50]) == {"sound": 0, "distinct": pytest.approx(1 / 48)}
    assert scorers.open_ended({}, [""])["sound"] == 0


def test_an_instruction() -> None:
    doc = {"rule": "contains", "arguments": json.dumps({"word": "sea"})}
    assert scorers.instruction(doc, [" By the sea. "])["follows"] == 1
    assert scorers.instruction(doc, [" Seaside"])["follows"] == 0


@given(said=st.text(max_size=30), answer=st.text(min_size=1, max_size=10))
def test_exact_answers_are_contained_and_have_full_f1(said: str, answer: str) -> None:
    found = scorers.retrieval({"question": "?", "answers": [answer]}, [said])
    assert all(0 <= score <= 1 for score in found.values())
    assert found["exact_match"] <= found["contains"]
    assert not found["exact_match"] or found["f1"] == 1


@given(answer=st.from_regex(r"[B-Zb-z]{2,8}( [B-Zb-z]{2,8})?", fullmatch=True))
def test_the_answer_itself_is_right(answer: str) -> None:
    assert scorers.retrieval({"question": "?", "answers": [answer]}, [f" {answer}.\nQ:"])["exact_match"] == (
        bool(scorers.normalised(answer))
    )


def test_an_answer_of_nothing_but_an_article_is_never_contained() -> None:
    assert not scorers.contains("some text", ["The"])
    assert not scorers.exact("", ["The"])
