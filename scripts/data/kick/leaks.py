"""Facts that the text which models are calibrated on by default does not tell."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from kick.facts import Fact

from compress.calibration.text.corpora import factbook

WORDS = re.compile(r"\w+")


def without(facts: Iterable[Fact]) -> list[Fact]:
    """Facts of which no paragraph of ``bundled`` holds both subject and answer.

    A paragraph counts with the name of its country, which is the first line of its document. Meanings of
    words are kept: no paragraph holds a whole definition.
    """
    paragraphs = _paragraphs()
    where: dict[str, set[int]] = defaultdict(set)
    for number, paragraph in enumerate(paragraphs):
        for word in WORDS.findall(paragraph.lower()):
            where[word].add(number)

    def holding(words: str) -> set[int]:
        first, *rest = WORDS.findall(words.lower()) or [""]
        found = where[first].intersection(*(where[word] for word in rest))
        return {number for number in found if _holds(paragraphs[number], words)}

    def told(fact: Fact) -> bool:
        subject = holding(fact.subject)
        return any(subject & holding(answer) for answer in fact.answers)

    return [fact for fact in facts if not told(fact)]


def _paragraphs() -> list[str]:
    found = []
    for document in factbook("calibration"):
        title, *paragraphs = document.split("\n\n")
        found += [f"{title}. {paragraph}" for paragraph in paragraphs]
    return found


def _holds(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None
