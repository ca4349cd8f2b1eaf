# ruff: noqa: E501
"""For every rule: answers that follow it, answers that do not, and every bundled instruction."""

from __future__ import annotations

import pytest

from compress.evaluation.kick import bundled
from compress.evaluation.kick.instructions import RULES, follows, follows_loosely

CASES = [
    ("contains", {"word": "sea"}, ["By the Sea.", "sea"], ["Overseas.", "season", ""]),
    ("starts", {"word": "Today"}, ["Today it rains.", '"today" it is'], ["It rains today.", "Todays", ""]),
    ("ends", {"words": "so it goes"}, ["A dog, so it goes.", "So it goes!"], ["So it goes, a dog.", ""]),
    ("upper", {}, ["THE DOG RUNS.", "IT IS 5 O'CLOCK"], ["The DOG RUNS", "A B", "1 2 3", ""]),
    ("lower", {}, ["the dog runs.", "it is 5 o'clock"], ["The dog runs", "a b", "1 2 3", ""]),
    ("quoted", {}, ['"The dog runs."', "“The dog runs.”"], ['The "dog" runs.', '"A" and "B"', "A", '""', ""]),
    ("numbered", {"count": 2}, ["1. tea\n2. silk", "1) tea\n\n2) silk"], ["1. tea", "1. a\n2. b\n3. c", "2. a\n1. b", "1.\n2.", ""]),
    ("bullets", {"count": 2}, ["- tea\n- silk", "* tea\n\n* silk"], ["- tea", "- a\n- b\n- c", "a\nb", "-\n-", ""]),
    ("repeats", {"text": "The dog runs."}, ["The dog runs.", '"the dog runs"'], ["The dog runs. Yes.", "The dog", ""]),
    ("one of", {"options": ["yes", "no"]}, ["yes", "No."], ["yes, it is", "perhaps", ""]),
    ("json", {"keys": ["name", "size"]}, ['{"size": 1, "name": "x"}', '```json\n{"name": 1, "size": {}}\n```'],
     ['{"name": 1}', '["name", "size"]', '{"name": 1, "size": 2} yes', "name, size", ""]),
]  # fmt: skip


def test_every_rule_has_its_cases() -> None:
    assert [rule for rule, *_ in CASES] == list(RULES)


@pytest.mark.parametrize(("rule", "arguments", "good", "bad"), CASES)
def test_rules(rule: str, arguments: dict, good: list[str], bad: list[str]) -> None:
    assert [answer for answer in good if not follows(f" {answer}\n", rule, arguments)] == []
    assert [answer for answer in bad if follows(f" {answer}\n", rule, arguments)] == []


def test_loosely_forgives_bold_type_and_a_line_around() -> None:
    chatty = "Sure, here it is:\n**THE DOG RUNS.**\nI hope it helps."
    assert not follows(chatty, "upper", {})
    assert follows_loosely(chatty, "upper", {})
    assert not follows_loosely("The dog runs.", "upper", {})


def test_every_bundled_instruction_can_be_followed_and_missed() -> None:
    for item in bundled.items("instruct"):
        assert follows(item["follows"], item["rule"], item["arguments"]), item
        assert not follows("I am sorry", item["rule"], item["arguments"]), item
        assert not follows("", item["rule"], item["arguments"]), item
