"""Means and proportions with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from compress.calibration.statistics.losses import LN_LARGEST
from compress.report.scorecard import Figure, UnitName

CONFIDENCE = 0.95
Z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""How many standard errors an interval reaches to either side, where the errors are known."""


def wilson(successes: int, total: int) -> Figure:
    """The share of successes in independent trials, with Wilson's interval."""
    return _wilson(successes / total, total)


def _wilson(share: float, trials: float) -> Figure:
    """As `wilson`, with a number of trials that may be an effective one."""
    width = Z**2 / trials
    middle = (share + width / 2) / (1 + width)
    reach = math.sqrt(width * share * (1 - share) + width**2 / 4) / (1 + width)
    # At 0 % and 100 %, rounding may put an end beyond the estimate, or the other beyond all shares.
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return Figure(value=share, low=min(low, share), high=max(high, share), unit="fraction")


def median_of_pairs(values: list[float], unit: UnitName = "") -> Figure:
    """The median of independent values, with the interval of the sign test, which needs six of them.

    The interval goes from the k-th smallest value to the k-th largest, with the largest k for which it misses
    the true median in at most 5 % of all cases. It assumes nothing about how the values are distributed.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    middle, k = statistics.median(ordered), int(binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5))
    ends = {"low": ordered[k - 1], "high": ordered[-k]} if k else {}
    return Figure(value=middle, unit=unit, **ends)


class MeanByWindow(NamedTuple):
    """A mean over tokens, with its standard error clustered by window."""

    mean: float
    standard_error: float | None  # None if there is only one window
    windows: int

    @property
    def quantile(self) -> float:
        """How many standard errors Student's t interval reaches to either side, with at least two windows."""
        from scipy.stats import t

        return float(t.ppf((1 + CONFIDENCE) / 2, self.windows - 1))

    def figure(self, transform: Callable[[float], float], unit: UnitName = "") -> Figure:
        """The transformed mean, and the transformed ends of its Student's t interval.

        Args:
            transform: an increasing function.
            unit: unit of its result.
        """
        if self.standard_error is None:
            return Figure(value=transform(self.mean), unit=unit)
        reach = self.quantile * self.standard_error
        return Figure(
            value=transform(self.mean),
            low=transform(self.mean - reach),
            high=transform(self.mean + reach),
            unit=unit,
        )


def mean_by_window(sums: list[float], counts: list[int]) -> MeanByWindow:
    """The mean over all tokens of a quantity, from its sums S_w and token counts c_w in each window w.

    The standard error is that of the ratio estimator m = sum_w S_w / C:
    se^2 = W / (W - 1) * sum_w (S_w - m c_w)^2 / C^2, with W windows and C = sum_w c_w tokens.
    """
    total, windows = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if windows < 2:
        return MeanByWindow(mean, None, windows)
    squares = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return MeanByWindow(mean, math.sqrt(windows / (windows - 1) * squares) / total, windows)


def share_by_window(successes: list[int], counts: list[int]) -> Figure:
    """The share of tokens, with Wilson's interval for as many independent ones as they are worth.

    They are worth p (1 - p) / se^2 (z / t)^2, at most their number, for the share p, its standard error se
    clustered by window, and the quantiles z of the normal and t of Student's distribution. Source: Korn and
    Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", Survey Methodology 24 (1998). Where only one window was read there is no interval.

    Args:
        successes, counts: how many tokens of each window are, and could be, successes.
    """
    found, total = mean_by_window([float(number) for number in successes], counts), sum(counts)
    if found.standard_error is None:
        return found.figure(lambda share: share, "fraction")
    spread = (found.standard_error * found.quantile / Z) ** 2
    return _wilson(found.mean, min(total, found.mean * (1 - found.mean) / spread) if spread else total)


def bounded_exp(mean: float) -> float:
    """exp, limited to the largest float, which the upper end of a wide interval may exceed."""
    return math.exp(min(mean, LN_LARGEST))
