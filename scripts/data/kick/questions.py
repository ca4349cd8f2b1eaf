"""Facts dealt to the tasks, each to one task only, and turned into their items."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from kick.facts import Fact

DEALT = {
    "factoid": {
        "capital": 25, "language": 20, "symbol": 28, "element": 28, "state capital": 22, "country": 80,
        "state": 70, "opposite": 110, "kind": 130, "nationality": 40,
    },
    "choice": {
        "capital": 25, "language": 18, "neighbour": 30, "symbol": 26, "element": 26, "state capital": 22,
        "country": 60, "state": 50, "opposite": 90, "kind": 80, "word": 150, "occupation": 30,
        "nationality": 25,
    },
    "retrieval": {"country": 180, "state": 120, "nationality": 120, "occupation": 110},
}  # fmt: skip
"""How many facts of a relation each task gets at most."""

MOST_ALIKE = 0.15
"""Largest share of a relation's facts in a task with the same answer, where there are enough others."""

EXAMPLES = 5
CHOICES = 4
SENTENCES = 5  # of an open-book passage: one with the answer, the others about others of its kind


class Dealer:
    """Deals facts in an order drawn by the seed.

    Args:
        facts: those that may be used.
        seed: of the order.
    """

    def __init__(self, facts: Iterable[Fact], seed: int) -> None:
        self.piles: dict[str, list[Fact]] = defaultdict(list)
        seen = set()
        for fact in facts:
            if fact.question not in seen and not _told(fact.question, fact.answers):
                self.piles[_pile(fact)].append(fact)
            seen.add(fact.question)
        self.random = random.Random(seed)
        for pile in self.piles.values():
            self.random.shuffle(pile)
        self.all = {pile: tuple(facts) for pile, facts in self.piles.items()}

    def deal(self, task: str) -> list[Fact]:
        dealt = [fact for pile, number in DEALT[task].items() for fact in self._take(pile, number)]
        self.random.shuffle(dealt)
        return dealt

    def _take(self, pile: str, number: int) -> list[Fact]:
        most = max(2, round(MOST_ALIKE * number))
        alike: Counter[str] = Counter()
        taken: list[Fact] = []
        for fact in self.piles[pile]:
            if len(taken) < number and alike[fact.answers[0]] < most:
                taken.append(fact)
                alike[fact.answers[0]] += 1
        self.piles[pile] = [fact for fact in self.piles[pile] if fact not in taken]
        return taken


def factoid(dealer: Dealer) -> list[dict[str, Any]]:
    return _with_examples([_asked(fact) for fact in dealer.deal("factoid")])


def choice(dealer: Dealer) -> list[dict[str, Any]]:
    """Four answers of one type, one of them right, in an order drawn by the seed."""
    items = []
    for fact in dealer.deal("choice"):
        wrong = _wrong(fact, dealer, CHOICES - 1)
        choices = [fact.answers[0], *wrong]
        dealer.random.shuffle(choices)
        items.append(
            {
                **_asked(fact),
                "statement": fact.statement,
                "choices": choices,
                "answer": choices.index(fact.answers[0]),
            }
        )
    return _with_examples(items)


def retrieval(dealer: Dealer) -> list[dict[str, Any]]:
    """Questions with a passage: the sentence that answers it among others of the same relation."""
    facts = dealer.deal("retrieval")
    items = []
    for fact in facts:
        others = [
            other for other in dealer.all[_pile(fact)]
            if other.subject != fact.subject and not _mentions(other.passage, fact.subject)
            and fact.answers[0] != other.answers[0]
        ]  # fmt: skip
        sentences = [fact.passage, *(other.passage for other in dealer.random.sample(others, SENTENCES - 1))]
        dealer.random.shuffle(sentences)
        items.append({**_asked(fact), "passage": " ".join(sentences)})
    return _with_examples(items)


def _wrong(fact: Fact, dealer: Dealer, number: int) -> list[str]:
    """Answers of the same relation that are wrong here."""
    right = {answer.lower() for answer in fact.answers} | {word.lower() for word in fact.never}
    found = {other.answers[0] for other in dealer.all[_pile(fact)] if other.relation == fact.relation}
    pool = sorted(
        answer for answer in found if answer.lower() not in right and not _mentions(fact.question, answer)
    )
    return dealer.random.sample(pool, number)


def _asked(fact: Fact) -> dict[str, Any]:
    return {"relation": fact.relation, "subject": fact.subject, "question": fact.question, "answers": list(fact.answers)}


def _with_examples(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark one item each of the first relations as an example to show in prompts."""
    shown: dict[str, dict[str, Any]] = {}
    for item in items:
        if len(shown) < EXAMPLES:
            shown.setdefault(_first_word(item["relation"]), item)
    examples = list(shown.values())
    rest = [item for item in items if item not in examples]
    return [{"split": "examples", **item} for item in examples] + [{"split": "test", **item} for item in rest]


def _pile(fact: Fact) -> str:
    return "word" if fact.relation.startswith("word ") else fact.relation


def _first_word(relation: str) -> str:
    return relation.split()[0]


def _told(question: str, answers: Iterable[str]) -> bool:
    """Whether the question holds an answer."""
    return any(_mentions(question, answer) for answer in answers)


def _mentions(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None
