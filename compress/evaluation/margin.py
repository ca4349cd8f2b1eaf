"""How large a loss can be: score tests and intervals of a paired difference, and how many questions decide.

A difference d is one question's score minus the dense model's, between -1 and 1. Where scores are right or
wrong, sums over d and d^2 hold the number of lost and of gained answers, which is all that the tests look at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from compress.errors import BadInput
from compress.evaluation.statistics import CONFIDENCE
from compress.report.scorecard import Figure

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.05
"""Largest share of wrong decisions of each test."""
POWER = 0.8
"""Share of repeated evaluations in which the stated number of questions decides."""

EDGE = 1 - 1e-9
"""Largest loss that is tried for the end of an interval; at 1 the statistic is infinite."""


@dataclass(frozen=True)
class Moments:
    """The first two moments of the differences of N questions.

    Attributes:
        questions: their number N.
        total: sum of d.
        squares: sum of d^2.
    """

    questions: int
    total: float
    squares: float

    @classmethod
    def of(cls, differences: np.ndarray) -> Self:
        """The moments of ``differences``, [N]."""
        return cls(len(differences), math.fsum(differences.tolist()), math.fsum((differences**2).tolist()))

    @classmethod
    def back(cls, questions: int, mean: float, standard_error: float) -> Self:
        """The moments whose mean and standard error these are."""
        return cls(questions, questions * mean, questions * (questions * standard_error**2 + mean**2))

    @classmethod
    def together(cls, tasks: Sequence[Moments]) -> Self:
        """The moments of all questions of several tasks, to the last digit in whatever order they come."""
        total, squares = math.fsum(task.total for task in tasks), math.fsum(task.squares for task in tasks)
        return cls(sum(task.questions for task in tasks), total, squares)

    def correlated(self, pairs: int, covariance: float) -> Moments:
        """The moments of as many independent questions as these are worth, with the same mean.

        They are worth N^2 / (N + pairs) questions, Kish's effective sample size where answers to the same
        question agree (Survey Sampling, 1965), and their error is the one that holds for these.

        Args:
            pairs: number of ordered pairs of two questions that ask the same.
            covariance: what these pairs add to the variance of the mean.
        """
        variance = max(0.0, self.standard_error**2 + covariance)
        return Moments.back(self.questions**2 // (self.questions + pairs), self.mean, math.sqrt(variance))

    @property
    def mean(self) -> float:
        return self.total / self.questions

    @property
    def standard_error(self) -> float:
        """sqrt(sum d^2 - (sum d)^2 / N) / N, so sqrt(b + c - (b - c)^2 / N) / N for b lost and c gained."""
        return math.sqrt(max(0.0, self.squares - self.total**2 / self.questions)) / self.questions

    @property
    def lost(self) -> float:
        """Lost answers. For other scores, those of a right-or-wrong task with the same moments."""
        return (self._changed - self.total) / 2

    @property
    def gained(self) -> float:
        """Gained answers, likewise."""
        return (self._changed + self.total) / 2

    @property
    def _changed(self) -> float:
        # Partial scores can lose little each and always, which no right-or-wrong task does.
        return max(self.squares, abs(self.total))


def score_z(lost: float, gained: float, questions: int, loss: float) -> float:
    """Tango's score statistic of the hypothesis that P(lost) - P(gained) = ``loss``.

    It is standard normal under the hypothesis and falls with ``loss``. Unlike the difference divided by its
    paired standard error it holds with few flips and none, where that standard error is 0. With ``loss`` 0 it
    is McNemar's (b - c) / sqrt(b + c). Source: Tango, "Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design", Statistics in Medicine 17 (1998).

    Args:
        lost, gained: number of answers that only the dense, or only the other model gets right.
        questions: number of questions.
        loss: between -1 and 1.
    """
    above = lost - gained - questions * loss
    deviation = math.sqrt(questions * variance_at(lost, gained, questions, loss))
    return above / deviation if deviation else math.copysign(math.inf, above) if above else 0.0


def variance_at(lost: float, gained: float, questions: int, loss: float) -> float:
    """The likeliest variance of a difference if P(lost) - P(gained) = ``loss``. Arguments as in `score_z`."""
    if loss < 0:
        return variance_at(gained, lost, questions, -loss)
    # The likeliest share q of gained answers solves 2 N q^2 + linear q = gained loss (1 - loss).
    linear = (2 * questions - lost + gained) * loss - lost - gained
    root = math.sqrt(linear**2 + 8 * questions * gained * loss * (1 - loss))
    # The same root in the form that does not subtract two large numbers.
    share = (
        (root - linear) / (4 * questions) if linear <= 0 else 2 * gained * loss * (1 - loss) / (root + linear)
    )
    return 2 * share + loss * (1 - loss)


def not_worse_p(moments: Moments, margin: float) -> float:
    """One-sided p of the hypothesis that the loss is ``margin`` (a share of all questions) or more."""
    from scipy.stats import norm

    return float(norm.cdf(score_z(moments.lost, moments.gained, moments.questions, margin)))


def worse_by_p(moments: Moments, margin: float) -> float:
    """One-sided p of the hypothesis that the loss is ``margin`` or less."""
    from scipy.stats import norm

    return float(norm.sf(score_z(moments.lost, moments.gained, moments.questions, margin)))


def change(moments: Moments) -> Figure:
    """The mean difference, with the 95 % interval of the losses that Tango's test does not reject."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    reach, loss = float(norm.ppf((1 + CONFIDENCE) / 2)), -moments.mean

    def end(wanted: float, edge: float) -> float:
        def beyond(at: float) -> float:
            return score_z(moments.lost, moments.gained, moments.questions, at) - wanted

        return float(brentq(beyond, loss, edge, xtol=1e-12)) if beyond(edge) * wanted > 0 else edge

    highest, lowest = end(-reach, EDGE), end(reach, -EDGE)
    return Figure(
        value=moments.mean,
        low=min(-highest, moments.mean),
        high=max(-lowest, moments.mean),
        unit="fraction",
    )


def check_margin(margin: float) -> None:
    """Raise `BadInput` if ``margin`` is no share of all questions that may be lost."""
    if not 0 < margin < 1:
        raise BadInput(f"A margin of {margin:g} is not between 0 and 1; 0.01 is one point.")


def needed(moments: Moments, margin: float, level_of_worse: float) -> int:
    """How many questions would decide if the loss and the share of flips are those seen here.

    The verdict then falls with probability :data:`POWER`: for "worse" if the loss is far enough from 0, for
    "not worse" if it is far enough from the margin, whichever takes fewer questions.

    Args:
        moments: what was seen; the result is more than its number of questions.
        margin: the loss that does not matter, more than 0.
        level_of_worse: level of the test for "worse".
    """
    from statsmodels.stats.power import normal_sample_size_one_tail

    loss, seen = -moments.mean, math.sqrt(moments.questions) * moments.standard_error

    def count(null: float, level: float) -> float:
        expected = math.sqrt(variance_at(moments.lost, moments.gained, moments.questions, null))
        return float(normal_sample_size_one_tail(abs(loss - null), POWER, level, expected, seen))

    counts = [count(margin, LEVEL)] if loss < margin else []
    counts += [count(0.0, level_of_worse)] if loss > 0 else []
    return max(moments.questions + 1, math.ceil(min(counts)))
