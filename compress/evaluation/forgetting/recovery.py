"""How much of the forgotten comes back: recovery, its paired intervals, and the gate.

Rec(q) = (S(q(U)) - S(q(R))) / (S(q(T)) - S(q(R))) for a score S that is higher for a model that remembers,
the unlearned model U, the target T that U was made from, the model R that never saw the forget set, and a
later step q, which is done to all three: 0 is a model that never knew, 1 one that has forgotten nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compress.evaluation.forgetting.intervals import Array, paired
from compress.report.forgetting import Kind, Recovered
from compress.report.scorecard import Figure

MOST = 0.10
"""The largest recovery that passes."""

MORE_THAN_BEFORE = 0.05
"""How far the recovery may lie above that of the same model in full precision."""


class Trio(NamedTuple):
    """One score of three models on the same records, each float64 [N] without NaN."""

    unlearned: Array
    target: Array
    retrained: Array

    @classmethod
    def of(cls, unlearned: Array, target: Array, retrained: Array) -> Trio:
        """The records that all three have the score of."""
        there = np.isfinite(unlearned) & np.isfinite(target) & np.isfinite(retrained)
        return cls(unlearned[there], target[there], retrained[there])


class Outcome(NamedTuple):
    """What the gate says, and why, as the end of a sentence."""

    kind: Kind
    why: str


def recovery(unlearned: Array, target: Array, retrained: Array, axis: int = -1) -> Array:
    """Rec of the means along an axis; infinite or NaN where target and retrained model score the same."""
    floor = retrained.mean(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (unlearned.mean(axis) - floor) / (target.mean(axis) - floor)


def gap(target: Array, retrained: Array, axis: int = -1) -> Array:
    """S(T) - S(R), what there is to forget."""
    return target.mean(axis) - retrained.mean(axis)


def recovered(trio: Trio, seed: int, before: Trio | None = None) -> Recovered:
    """The recovery of one score with paired intervals.

    Args:
        trio: the scores after a later step.
        seed: of the bootstrap.
        before: those in full precision; None if ``trio`` is it.
    """
    known = paired(gap, [trio.target, trio.retrained], seed)
    means = {name: paired(_mean, [column], seed) for name, column in trio._asdict().items()}
    if _low(known) <= 0:
        return Recovered(**means, gap=known)
    value = paired(recovery, trio, seed)
    if before is None or _low(paired(gap, [before.target, before.retrained], seed)) <= 0:
        return Recovered(**means, gap=known, recovery=value)
    return Recovered(**means, gap=known, recovery=value, rise=paired(rise, [*trio, *before], seed))


def _mean(column: Array, axis: int = -1) -> Array:
    return column.mean(axis)


def rise(*columns: Array, axis: int = -1) -> Array:
    """Rec(q) - max(0, Rec in full precision), from the columns of both trios.

    A model that scores below one that never learned knows no less than that one, so coming up to it is no
    rise.
    """
    after, before = Trio(*columns[:3]), Trio(*columns[3:])
    full = np.maximum(0.0, recovery(before.unlearned, before.target, before.retrained, axis=axis))
    with np.errstate(invalid="ignore"):  # of two infinite recoveries
        return recovery(after.unlearned, after.target, after.retrained, axis=axis) - full


def gate(found: Recovered, singles: dict[str, Recovered]) -> Outcome:
    """Whether a model stays forgotten after a step.

    It does if the upper end of the interval of the recovery of ``found`` is at most `MOST`, that of its rise
    over full precision at most `MORE_THAN_BEFORE`, and no single score recovers more than `MOST` beyond
    doubt, that is with the lower end of its interval. Nothing can be said where the target does not know
    more than the retrained model beyond doubt.

    Args:
        found: the recovery of what is known on the whole.
        singles: that of each way to ask, by name.
    """
    if found.gap is None:
        return Outcome("cannot tell", "there is neither a retrained model nor a wrong answer to compare with")
    if found.recovery is None:
        return Outcome(
            "cannot tell", "the target itself does not know more than a model that never learned it"
        )
    leaks = [name for name, one in singles.items() if one.recovery and _low(one.recovery) > MOST]
    if _high(found.recovery) > MOST:
        return Outcome("not forgotten", f"its recovery is {found.recovery}, which may be above {MOST:.2f}")
    if found.rise is not None and _high(found.rise) > MORE_THAN_BEFORE:
        return Outcome(
            "not forgotten",
            f"its recovery rises by {found.rise}, which may be more than {MORE_THAN_BEFORE:.2f}, over that "
            "in full precision",
        )
    if leaks:
        return Outcome(
            "not forgotten", f"asked for by {' and '.join(leaks)}, it recovers more than {MOST:.2f}"
        )
    return Outcome("forgotten", f"its recovery is {found.recovery}")


def _low(figure: Figure) -> float:
    return figure.value if figure.low is None else figure.low


def _high(figure: Figure) -> float:
    return figure.value if figure.high is None else figure.high
