"""How a completion is scored; lm-eval calls these as ``process_results``.

Only the completion counts, never the prompt, and an empty one is wrong. ``exact_match`` is strict: the
completion, up to its first line break, is the answer and nothing else once case, punctuation and articles are
taken away. ``contains`` asks only that the answer occurs in it as whole words. ``legacy`` is what the
published scripts of LLM-KICK would have said, with their defects; it is there to compare with the paper.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Document = dict[str, Any]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}‘’´`]")


def factoid(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Short answers to ``doc["question"]``; right ones are ``doc["answers"]``.

    ``legacy`` looks for an answer, without spaces, in prompt and completion together, so that a question that
    holds its answer is always right.
    """
    said, answers = results[0], doc["answers"]
    echoed = f"Please give answer to this question: {doc['question']}\nThe answer is {said}"
    legacy = any(_squashed(answer) in _squashed(echoed) for answer in answers)
    return {**_short(said, answers), "legacy": float(legacy)}


def retrieval(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """As `factoid`, with the best F1 over words.

    ``legacy`` takes containment either way, so that an empty completion, which every answer holds, is right.
    """
    said, answers = results[0], doc["answers"]
    line = normalised(first_line(said))
    legacy = any(line in normalised(answer) or normalised(answer) in line for answer in answers)
    f1 = max(word_f1(first_line(said), answer) for answer in answers)
    return {**_short(said, answers), "f1": f1, "legacy": float(legacy)}


def first_line(text: str) -> str:
    """The first line that is not blank, without spaces around it."""
    return text.strip().split("\n")[0].strip()


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub(" ", text.lower())).split())


def exact(said: str, answers: Iterable[str]) -> bool:
    """Whether the first line is an answer and nothing else; an empty one never is."""
    line = normalised(first_line(said))
    return bool(line) and any(line == normalised(answer) for answer in answers)


def contains(said: str, answers: Iterable[str]) -> bool:
    """Whether an answer occurs in the first line as whole words; an empty answer never does."""
    line = f" {normalised(first_line(said))} "
    return any(f" {words} " in line for answer in answers if (words := normalised(answer)))


def word_f1(said: str, answer: str) -> float:
    """F1 over the words in common, between 0 and 1."""
    ours, theirs = normalised(said).split(), normalised(answer).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _short(said: str, answers: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(exact(said, answers)), "contains": float(contains(said, answers))}


def _squashed(text: str) -> str:
    return text.lower().replace(" ", "")
