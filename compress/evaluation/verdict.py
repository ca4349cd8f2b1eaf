"""The verdict over all tasks: worse, not worse by more than the margin, or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.evaluation.margin import LEVEL, Moments, change, needed, not_worse_p, worse_by_p
from compress.evaluation.pooled import Ways, holm
from compress.report.scorecard import Figure, Shared, TaskResult, Verdict

Kind = Literal["worse", "not worse", "undecided"]


@dataclass(frozen=True)
class Loss:
    """The loss over several tasks, question by question, against a margin.

    Attributes:
        tasks: their number.
        questions: the number of all questions.
        moments: of the differences of as many independent questions as these are worth.
        margin: the loss that does not matter, as a share of all questions.
        margin_p: one-sided p that the loss is below the margin (Tango's score test).
        broken: tasks that lose more than the margin beyond doubt, corrected for their number (Holm).
    """

    tasks: int
    questions: int
    moments: Moments
    margin: float
    margin_p: float
    broken: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether the loss is below the margin beyond doubt, and no task is broken: many others would outvote
        it."""
        return self.margin_p < LEVEL and not self.broken

    def needed(self, level_of_worse: float) -> int:
        """How many questions would decide, if as many of them ask the same. The level is as in `needed`."""
        worth = needed(self.moments, self.margin, level_of_worse)
        return math.ceil(worth * self.questions / self.moments.questions)

    @property
    def text(self) -> str:
        """What was found, as a part of a sentence."""
        number = f"{self.questions:,} question{'s' * (self.questions > 1)}"
        found = f"its score changes by {change(self.moments).text} points on {number}"
        found += f" of {self.tasks} tasks" * (self.tasks > 1)
        if not self.broken:
            return found
        lose = "lose" if len(self.broken) > 1 else "loses"
        return f"{found}, and {_listed(self.broken)} {lose} more than {points(self.margin)}"


def loss(
    results: Sequence[TaskResult], questions: Sequence[int], shared: Sequence[Shared], margin: float
) -> Loss:
    """The loss over some tasks.

    Args:
        results: each task's, with its change and standard error.
        questions: their numbers of questions.
        shared: the pairs of tasks, of these and others, that ask about the same documents.
        margin: as in `Loss`.
    """
    moments = [_moments(*each) for each in zip(results, questions, strict=True)]
    whole = together(dict(zip((each.task for each in results), moments, strict=True)), shared)
    more = holm([worse_by_p(each, margin) for each in moments])
    broken = tuple(result.task for result, p in zip(results, more, strict=True) if p < LEVEL)
    return Loss(len(moments), sum(questions), whole, margin, not_worse_p(whole, margin), broken)


def together(tasks: Mapping[str, Moments], shared: Sequence[Shared]) -> Moments:
    """The moments of as many independent questions as those of all tasks are worth.

    Args:
        tasks: by name.
        shared: as in `loss`.
    """
    whole = Moments.together(list(tasks.values()))
    shares = {task: moments.questions / whole.questions for task, moments in tasks.items()}
    pairs = [pair for pair in shared if shares.keys() >= set(pair.tasks)]
    return whole.correlated(
        2 * sum(pair.documents for pair in pairs),
        2 * math.fsum(math.prod(shares[task] for task in pair.tasks) * pair.covariance for pair in pairs),
    )


def _moments(result: TaskResult, questions: int) -> Moments:
    assert result.change is not None
    assert result.standard_error is not None
    return Moments.back(questions, result.change.value, result.standard_error)


def verdict(
    results: Sequence[TaskResult],
    questions: Sequence[int],
    shared: Sequence[Shared],
    ways: Ways,
    margin: float,
) -> Verdict:
    """Decide over all tasks together.

    "not worse" says that the loss is below the margin (see `Loss`). Otherwise "worse" says that there is a
    loss at all (see :mod:`compress.evaluation.pooled`). Each of the two tests errs in about 5 % of
    cases at most: Tango's score is asymptotic, and where no answer flips, an exact test would ask for a tenth
    more questions.

    Args:
        results, questions, shared, margin: as in `loss`.
        ways: p that the model is worse.
    """
    found, lost = loss(results, questions, shared, margin), ways.combined < LEVEL
    kind: Kind = "undecided"
    if found.within:
        kind = "not worse"
    elif lost or found.broken:
        kind = "worse"
    wanted = found.needed(LEVEL / len(ways)) if kind == "undecided" else None
    return Verdict(
        kind=kind,
        margin=margin,
        change=change(found.moments),
        standard_error=found.moments.standard_error,
        worse_p=Figure(value=ways.combined),
        margin_p=Figure(value=found.margin_p),
        pooled_p=Figure(value=ways.pooled),
        max_drop_p=Figure(value=ways.max_drop),
        fisher_p=Figure(value=ways.fisher),
        broken=found.broken,
        questions=found.questions,
        needed=wanted,
        sentence=_sentence(kind, found, ways.combined, wanted),
    )


def _sentence(kind: Kind, found: Loss, worse_p: float, wanted: int | None) -> str:
    limit, p = points(found.margin), f"p = {worse_p:.2g}" if worse_p >= 1e-4 else "p < 0.0001"
    if kind == "worse":
        return f"Worse than the dense model: {found.text} ({p})."
    if kind == "not worse":
        smaller = f"; a smaller loss is certain ({p})" if worse_p < LEVEL else ""
        return f"Not worse than the dense model by more than {limit}: {found.text}{smaller}."
    assert wanted is not None
    more = rounded(wanted - found.questions)
    return (
        f"Undecided whether it is worse than the dense model by more than {limit}: {found.text}; about "
        f"{more:,} more questions like these would decide."
    )


def points(share: float) -> str:
    """A share of all questions in percentage points, in words: ``1 point``."""
    number = f"{100 * share:.6g}"
    return f"{number} point{'s' * (number != '1')}"


def rounded(number: int) -> int:
    """Two digits, upwards: more would claim to know the future."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])
