"""How a completion is scored; lm-eval calls these as ``process_results``.

Only the completion counts, never the prompt, and an empty one is wrong. ``exact_match`` is strict: the
completion, up to its first line break, is the answer and nothing else once case, punctuation and articles are
taken away. ``contains`` asks only that the answer occurs in it as whole words. ``legacy`` is what the
published scripts of LLM-KICK would have said, with their defects; it is there to compare with the paper.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from compress.evaluation.kick.instructions import follows, follows_loosely

Document = dict[str, Any]

ARTICLES = re.compile(r"\b(a|an|the)\b")
STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "may",
        "more",
        "most",
        "no",
        "not",
        "of",
        "on",
        "one",
        "only",
        "or",
        "other",
        "our",
        "out",
        "she",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "up",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}‘’´`]")


class ContentWords:
    """The stemmed words of a text without stop words, as `rouge_score` wants to be given them."""

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenizers import DefaultTokenizer

        words = " ".join(word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in STOP_WORDS)
        return list(DefaultTokenizer(use_stemmer=True).tokenize(words))


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


def letter(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """A letter that names one of four answers; ``doc["answer"]`` is the right one's number.

    ``answered`` says whether the completion begins with a letter at all. ``legacy`` compares the last
    character of the completion, whatever stands before it.
    """
    right, said = "ABCD"[int(doc["answer"])], results[0].strip()
    match = re.match(r"\(?([A-D])(?!\w)", said)
    chosen = match[1] if match else ""
    return {
        "exact_match": float(chosen == right),
        "answered": float(bool(chosen)),
        "legacy": float(said[-1:] == right),
    }


def choice(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """One of four answers in words; ``doc["answer"]`` is the right one's number in ``doc["choices"]``.

    ``contains`` takes the right answer inside a longer line, if no other one is there too; ``answered`` says
    whether the line is one of the four.
    """
    said, choices = results[0], doc["choices"]
    right = choices[int(doc["answer"])]
    mentioned = [one for one in choices if contains(said, [one])]
    return {
        "exact_match": float(exact(said, [right])),
        "contains": float(mentioned == [right]),
        "answered": float(exact(said, choices)),
    }


def summary(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """ROUGE F1 of a summary with ``doc["summary"]``, which should have less than ``doc["words"]`` words.

    ``content`` is ROUGE-1 over stemmed words without stop words (option -s of ROUGE 1.5.5): with them, a
    string of nothing but stop words beats short summaries. The other ROUGEs are as usual.
    ``obeys`` says whether it is not empty and short enough, ``distinct`` which share of its sequences of
    three words occur once (1 for shorter texts): compressed models repeat themselves.
    """
    from rouge_score.rouge_scorer import RougeScorer

    said = results[0].strip()
    found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(doc["summary"], said)
    rouge = {kind: float(score.fmeasure) for kind, score in found.items()}
    content = RougeScorer(["rouge1"], tokenizer=ContentWords()).score(doc["summary"], said)
    rouge["content"] = float(content["rouge1"].fmeasure)
    return {**rouge, "obeys": float(0 < len(said.split()) < doc["words"]), "distinct": distinct(said)}


def instruction(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether an answer follows ``doc["rule"]`` with ``doc["arguments"]`` (JSON), strictly and loosely."""
    arguments = json.loads(doc["arguments"])
    return {
        "follows": float(follows(results[0], doc["rule"], arguments)),
        "loosely": float(follows_loosely(results[0], doc["rule"], arguments)),
        "distinct": distinct(results[0]),
    }


def open_ended(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """What can be said of an answer without knowing whether it is good: that needs a judge.

    ``sound`` is 1 for an answer that is not empty and does not repeat itself (`distinct` of at least a half).
    """
    said = results[0].strip()
    return {"sound": float(bool(said) and distinct(said) >= 0.5), "distinct": distinct(said)}


def distinct(text: str) -> float:
    """Share of the sequences of three words that are different ones; 0 for no word, 1 for one or two."""
    words = text.lower().split()
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(threes)) / len(threes) if threes else float(bool(words))


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
