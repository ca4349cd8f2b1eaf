"""Stories of the Factbook to summarise, each with the sentence that says most of it.

Nobody has written summaries of them, so the reference is made as PEGASUS makes its own (Zhang et al. 2020,
arXiv:1912.08777, "gap sentences", Ind-Orig): of each story the sentence whose words overlap most with the
rest of it is taken out and is the reference.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from compress.calibration.text.corpora import factbook

SHORTEST, LONGEST = 75, 150
"""Words of a story, with its reference."""

REFERENCE = (10, 40)
"""Words of a reference."""

PROSE = 25  # words of a paragraph; shorter ones are lists and remarks
WORDS = 30  # that a summary has to stay under
STORIES = 510
SENTENCES = 4  # of a story at least, with its reference
WORD = re.compile(r"[a-z0-9]+")
STOPS = frozenset(
    [
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "to",
        "was",
        "were",
        "with",
    ]
)
END = re.compile(r"(?<=[a-z0-9)\"%][.;])\s+(?=[A-Za-z\"])")


def stories(seed: int) -> list[dict[str, Any]]:
    """Stories about the countries no model is calibrated on by default, in an order drawn by ``seed``."""
    found = [item for document in factbook("evaluation") for item in _of_country(document)]
    random.Random(seed).shuffle(found)
    return [{"split": "test", "words": WORDS, **item} for item in found[:STORIES]]


def _of_country(document: str) -> Iterator[dict[str, Any]]:
    title, *paragraphs = document.split("\n\n")
    prose = (paragraph for paragraph in paragraphs if len(paragraph.split()) >= PROSE)
    for sentences in packed(sentence for paragraph in prose for sentence in _sentences(paragraph)):
        if sentences and (reference := principal(sentences)):
            story = " ".join(sentence for sentence in sentences if sentence != reference)
            yield {"title": title, "story": f"{title}. {story}", "summary": reference}


def packed(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Whole sentences in order, as many as make a story of the right length; what is left over is dropped."""
    story: list[str] = []
    for sentence in sentences:
        words = len(" ".join([*story, sentence]).split())
        if words > LONGEST:
            story = []
        story.append(sentence)
        if len(" ".join(story).split()) >= SHORTEST and len(story) >= SENTENCES:
            yield story
            story = []


def principal(sentences: list[str]) -> str | None:
    """The sentence, as long as a reference, that shares most words with the rest (F1); None without any."""
    best, chosen = 0.0, None
    for number, sentence in enumerate(sentences):
        score = overlap(sentence, " ".join(sentences[:number] + sentences[number + 1 :]))
        if REFERENCE[0] <= len(sentence.split()) <= REFERENCE[1] and score > best:
            best, chosen = score, sentence
    return chosen


def overlap(one: str, other: str) -> float:
    """F1 over the words in common, those that carry no meaning left out."""
    ours, theirs = (Counter(w for w in WORD.findall(text.lower()) if w not in STOPS) for text in (one, other))
    common = sum((ours & theirs).values())
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def _sentences(paragraph: str) -> list[str]:
    text = re.sub(r"^[A-Z][^:.]{2,60}: ", "", paragraph)  # the heading
    return [_finished(sentence) for sentence in END.split(text) if _whole(sentence)]


def _whole(sentence: str) -> bool:
    return len(sentence.split()) >= 5 and sentence.count("(") == sentence.count(")")


def _finished(sentence: str) -> str:
    text = sentence.strip().rstrip(";").strip()
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
