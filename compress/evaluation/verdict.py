"""The verdict over all tasks: worse, not worse by more than the margin, or undecided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from compress.evaluation.margin import LEVEL, Moments, change, needed, not_worse_p, worse_by_p
from compress.report.scorecard import Figure, TaskResult, Verdict

if TYPE_CHECKING:
    from compress.evaluation.pooled import Ways

Kind = Literal["worse", "not worse", "undecided"]


def verdict(results: Sequence[TaskResult], questions: Sequence[int], ways: Ways, margin: float) -> Verdict:
    """Decide over all tasks together, question by question.

    "not worse" says that the loss over all questions is below the margin (Tango's score test), and that no
    task loses more than the margin beyond doubt: a broken task is not outvoted by many others. "worse" says
    that there is a loss (three tests, see :mod:`compress.evaluation.pooled`). A loss that is certain but
    smaller than the margin is "not worse". Each of the tests errs in at most 5 % of cases.

    Args:
        results: each task's, with its change and standard error.
        questions: their numbers of questions.
        ways: p that the model is worse.
        margin: the loss that does not matter, as a share of all questions.
    """
    moments = [_moments(*each) for each in zip(results, questions, strict=True)]
    whole = sum(moments[1:], start=moments[0])
    within, broken = not_worse_p(whole, margin), _broken(results, moments, margin)
    kind: Kind = "undecided"
    if broken or within >= LEVEL > ways.combined:
        kind = "worse"
    elif within < LEVEL:
        kind = "not worse"
    total, changed = whole.questions, change(whole)
    wanted = needed(whole, margin, LEVEL / len(ways)) if kind == "undecided" else None
    return Verdict(
        kind=kind,
        margin=margin,
        change=changed,
        standard_error=whole.standard_error,
        worse_p=Figure(value=ways.combined),
        margin_p=Figure(value=within),
        pooled_p=Figure(value=ways.pooled),
        max_drop_p=Figure(value=ways.max_drop),
        fisher_p=Figure(value=ways.fisher),
        broken=broken,
        questions=total,
        needed=wanted,
        sentence=_sentence(kind, margin, changed, total, len(results), ways.combined, broken, wanted),
    )


def _moments(result: TaskResult, questions: int) -> Moments:
    assert result.change is not None
    assert result.standard_error is not None
    return Moments.back(questions, result.change.value, result.standard_error)


def _broken(results: Sequence[TaskResult], moments: Sequence[Moments], margin: float) -> tuple[str, ...]:
    from statsmodels.stats.multitest import multipletests

    rejected = multipletests([worse_by_p(each, margin) for each in moments], LEVEL, method="holm")[0]
    return tuple(result.task for result, is_broken in zip(results, rejected, strict=True) if is_broken)


def _sentence(
    kind: Kind,
    margin: float,
    changed: Figure,
    questions: int,
    tasks: int,
    worse_p: float,
    broken: Sequence[str],
    wanted: int | None,
) -> str:
    limit = points(margin)
    found = (
        f"its score changes by {changed.text} points on {questions:,} questions of {tasks} "
        f"task{'s' * (tasks > 1)}"
    )
    lost = f", and {' and '.join(broken)} lose{'s' * (len(broken) == 1)} more than {limit}" if broken else ""
    sure = worse_p < LEVEL
    if kind == "worse":
        return f"Worse than the dense model: {found}{f' ({_p(worse_p)})' * sure}{lost}."
    if kind == "not worse":
        certain = f"; a smaller loss is certain ({_p(worse_p)})" if sure else ""
        return f"Not worse than the dense model by more than {limit}: {found}{certain}."
    assert wanted is not None
    return (
        f"Undecided whether it is worse than the dense model by more than {limit}: {found}; about "
        f"{_rounded(wanted - questions):,} more questions like these would decide."
    )


def points(share: float) -> str:
    """A share of all questions in percentage points, in words: ``1 point``."""
    number = f"{100 * share:.6g}"
    return f"{number} point{'s' * (number != '1')}"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def _rounded(number: int) -> int:
    """Two digits, upwards: more would claim to know the future."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit
