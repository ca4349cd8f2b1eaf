"""Means and proportions with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from compress.calibration.statistics.losses import LN_LARGEST
from compress.report.scorecard import Figure

CONFIDENCE = 0.95


def wilson(successes: int, total: int) -> Figure:
    """A share of independent trials with Wilson's interval."""
    from scipy.stats import binomtest

    share, interval = (
        successes / total,
        binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson"),
    )
    # At 0 % and 100 % rounding may cross the estimate.
    return Figure(value=share, low=min(interval.low, share), high=max(interval.high, share), unit="fraction")


class MeanByWindow(NamedTuple):
    """A mean over tokens with the standard error that windows as clusters give it."""

    mean: float
    standard_error: float | None  # none with a single window
    windows: int

    def figure(self, transform: Callable[[float], float], unit: str = "") -> Figure:
        """The transformed mean, with Student's t interval transformed end by end (transform: increasing)."""
        if self.standard_error is None:
            return Figure(value=transform(self.mean), unit=unit)
        from scipy.stats import t

        reach = float(t.ppf((1 + CONFIDENCE) / 2, self.windows - 1)) * self.standard_error
        return Figure(
            value=transform(self.mean),
            low=transform(self.mean - reach),
            high=transform(self.mean + reach),
            unit=unit,
        )


def mean_by_window(sums: list[float], counts: list[int]) -> MeanByWindow:
    """Mean over all tokens of a quantity whose sum (and number of tokens) in each window is given.

    Standard error of the ratio estimator m = sum_w S_w / C:
    se^2 = W / (W - 1) * sum_w (S_w - m c_w)^2 / C^2, with W windows and C = sum_w c_w tokens.
    """
    total, windows = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if windows < 2:
        return MeanByWindow(mean, None, windows)
    squares = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return MeanByWindow(mean, math.sqrt(windows / (windows - 1) * squares) / total, windows)


def bounded_exp(mean: float) -> float:
    """exp, with the upper end of a wild interval held at the largest number there is."""
    return math.exp(min(mean, LN_LARGEST))
