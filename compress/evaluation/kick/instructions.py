"""Instructions that a rule can check, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911).

An item names its rule and the rule's arguments. Rules look at the form of an answer only; whether it is true
or good is not for them to say. An empty answer follows none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


def contains(answer: str, word: str) -> bool:
    """It holds a word."""
    return _has(answer, word)


def starts(answer: str, word: str) -> bool:
    """It begins with a word, in upper or lower case."""
    return re.match(rf"[\"'*]*{re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def ends(answer: str, words: str) -> bool:
    """It ends with certain words, in upper or lower case; punctuation after them does not count."""
    return answer.rstrip(" .!?\"'*").lower().endswith(words.lower())


def upper(answer: str) -> bool:
    """It has no small letter, and at least three words."""
    return answer.isupper() and len(answer.split()) >= 3


def lower(answer: str) -> bool:
    """It has no capital letter, and at least three words."""
    return answer.islower() and len(answer.split()) >= 3


def quoted(answer: str) -> bool:
    """It stands in double quotes as a whole."""
    return re.fullmatch(r'["“][^"“”]+["”]', answer) is not None


def numbered(answer: str, count: int) -> bool:
    """Its lines are numbered 1 to ``count``, and there are no others."""
    lines = _lines(answer)
    return len(lines) == count and all(
        re.match(rf"{number}[.)]\s*\S", line) for number, line in enumerate(lines, start=1)
    )


def bullets(answer: str, count: int) -> bool:
    """It is ``count`` lines that begin with a hyphen or an asterisk, and there are no others."""
    lines = _lines(answer)
    return len(lines) == count and all(re.match(r"[-*]\s*\S", line) for line in lines)


def repeats(answer: str, text: str) -> bool:
    """It is a text and nothing else; quotes around it and its case do not count."""
    return _words(answer) == _words(text)


def one_of(answer: str, options: list[str]) -> bool:
    """It is one of some words and nothing else."""
    return _words(answer) in [_words(option) for option in options]


def json_keys(answer: str, keys: list[str]) -> bool:
    """It is a JSON object with exactly these keys, in any order; a code fence around it does not count."""
    try:
        found = json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", answer))
    except ValueError:
        return False
    return isinstance(found, dict) and sorted(found) == sorted(keys)


RULES: dict[str, Callable[..., bool]] = {
    "contains": contains,
    "starts": starts,
    "ends": ends,
    "upper": upper,
    "lower": lower,
    "quoted": quoted,
    "numbered": numbered,
    "bullets": bullets,
    "repeats": repeats,
    "one of": one_of,
    "json": json_keys,
}


def follows(answer: str, rule: str, arguments: dict[str, Any]) -> bool:
    """Whether an answer follows an instruction, to the letter.

    Args:
        answer: the completion; spaces around it do not count.
        rule: a name in `RULES`.
        arguments: of the rule.
    """
    answer = answer.strip()
    return bool(answer) and RULES[rule](answer, **arguments)


def follows_loosely(answer: str, rule: str, arguments: dict[str, Any]) -> bool:
    """As `follows`, but bold type and a first or last line around the answer, are forgiven, as in IFEval."""
    lines = answer.strip().split("\n")
    around = ("\n".join(part) for part in (lines, lines[1:], lines[:-1], lines[1:-1]))
    return any(follows(text, rule, arguments) for part in around for text in (part, part.replace("*", "")))


def _has(answer: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.split("\n") if line.strip()]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
