"""Which cells of a comparison are about other questions than their column, and why.

Text that was scored in different ways is refused, because its figures are all of the one text. Tasks of
lm-eval are scored one by one, and whoever knows lm-eval expects to see them side by side: a cell whose task
was asked differently stays, with a mark and a note. It never competes for the best value of its column. Its
star and its verdict hold, since they compare a model with the dense model's answers to the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from compress.report.choose import short
from compress.report.columns import ALL_TASKS, FORGETTING
from compress.report.forgetting import Forgetting
from compress.report.scorecard import Figure, Scorecard

T = TypeVar("T")
Ways = dict[str, tuple[tuple[str, object], ...]]
"""Task -> how it was asked."""

LABELS = {
    "questions": "number of questions",
    "fewshot": "number of examples in front",
    "metric": "deciding metric",
    "chat_template": "chat template",
    "seed": "seed",
    "lm_eval": "version of lm-eval",
    "sha256": "hash of prompts and answers",
}

SETS = ("forget", "retain", "holdout", "world")
"""The sets of records of an audit."""


class Difference(NamedTuple):
    """Why some cells of a model are about something else than their columns.

    Attributes:
        model: its name.
        where: the tasks, `ALL_TASKS`, or `FORGETTING`.
        why: a part of a sentence.
    """

    model: str
    where: tuple[str, ...]
    why: str


def differences(cards: Sequence[Scorecard], audits: Sequence[Forgetting | None]) -> list[list[Difference]]:
    """What was asked differently than of most models, or of the dense one: a list for every card.

    Args:
        cards: the scorecards of a comparison, the dense model's first.
        audits: the newest one of each model.
    """
    ways = [_ways(card) for card in cards]
    dense = ways[0] if cards and cards[0].is_dense else {}
    tasks = dict.fromkeys(task for of_one in ways for task in of_one)
    usual = {task: dense.get(task) or _most(way[task] for way in ways if task in way) for task in tasks}
    found = [_of_tasks(card, way, usual) for card, way in zip(cards, ways, strict=True)]
    every = zip(cards, ways, found, strict=True)
    judged = [each for each in every if _margin(each[0]) is not None]
    if judged:
        usual_tasks = frozenset(dense) or _most(frozenset(way) for _, way, _ in judged)
        margin = _most(_margin(card) for card, _, _ in judged)
        for card, way, rows in judged:
            rows += _of_verdict(card, frozenset(way) != usual_tasks or bool(rows), margin)
    made = [(card, rows, audit) for card, rows, audit in zip(cards, found, audits, strict=True) if audit]
    if made:
        protocol = _most(_protocol(audit) for *_, audit in made)
        for card, rows, audit in made:
            rows += _of_audit(card, dict(_protocol(audit)), dict(protocol))
    return found


def _protocol(audit: Forgetting) -> tuple[tuple[str, object], ...]:
    """How a model was audited: the models it is compared with, the records, and the rest."""
    protocol = audit.protocol
    return (
        ("target", audit.target.sha256),
        *(
            (f"records {name}", used.sha256 if used else None)
            for name, used in ((name, protocol.sets.get(name)) for name in SETS)
        ),
        ("floor", audit.retrained.sha256 if audit.retrained else protocol.floor),
        ("tokens of a record", protocol.seqlen),
    )


def _of_audit(card: Scorecard, way: dict[str, object], usual: dict[str, object]) -> list[Difference]:
    different = [name for name in usual if way[name] != usual[name]]
    if not different:
        return []
    why = ", ".join(f"{name} {_shown(way[name])} instead of {_shown(usual[name])}" for name in different)
    return [Difference(card.model.name, (FORGETTING,), why)]


def _ways(card: Scorecard) -> Ways:
    protocol = card.harness_protocol
    if protocol is None:
        return {}
    whole = {"chat_template": protocol.chat_template, "seed": protocol.seed, "lm_eval": protocol.lm_eval}
    return {
        asked.task: tuple({**asked.model_dump(exclude={"task", "chance"}), **whole}.items())
        for asked in protocol.tasks
    }


def _most(values: Iterable[T]) -> T:
    """The most frequent value, of several the first."""
    return Counter(values).most_common(1)[0][0]


def _of_tasks(card: Scorecard, ways: Ways, usual: Ways) -> list[Difference]:
    reasons: dict[str, list[str]] = {}
    for task, way in ways.items():
        if way != usual[task]:
            reasons.setdefault(_why(dict(way), dict(usual[task])), []).append(task)
    return [Difference(card.model.name, tuple(tasks), why) for why, tasks in reasons.items()]


def _why(way: dict[str, object], usual: dict[str, object]) -> str:
    """What differs. Another hash follows from another number of questions, and is said only on its own."""
    different = [name for name in LABELS if way[name] != usual[name]]
    if len(different) > 1 and "sha256" in different:
        different.remove("sha256")
    return ", ".join(
        f"{LABELS[name]} {_shown(way[name])} instead of {_shown(usual[name])}" for name in different
    )


def _shown(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else short(value)


def _margin(card: Scorecard) -> float | None:
    return card.harness.verdict.margin if card.harness and card.harness.verdict else None


def _of_verdict(card: Scorecard, other_questions: bool, usual: float | None) -> list[Difference]:
    margin = _margin(card)
    reasons = ["it is over other questions"] * other_questions
    if margin != usual and margin is not None and usual is not None:
        mine, others = (str(Figure(value=each, unit="fraction")) for each in (margin, usual))
        reasons.append(f"its margin is {mine} of the questions instead of {others}")
    return [Difference(card.model.name, (ALL_TASKS,), why) for why in reasons]
