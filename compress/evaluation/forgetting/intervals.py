"""Paired intervals: records are drawn again, and all models answer the same ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.report.scorecard import Figure, UnitName

ENDS = (0.025, 0.975)
"""The interval lies between these quantiles of the draws."""

RESAMPLES = 4999
ROOM = 2**22
"""Values of one drawn array at once, 32 MB."""

Array = NDArray[np.float64]
Statistic = Callable[..., Array]


def paired(
    statistic: Statistic, columns: Sequence[Array], seed: int, *, unit: UnitName = "", cut: float = 1e6
) -> Figure:
    """A statistic of several columns of the same records, with its bootstrapped 95 % interval (percentiles).

    Draws of records for which the statistic is not defined, such as a ratio 0 / 0, are left out.

    Args:
        statistic: of arrays [..., N] (called with ``axis=-1``), such as a ratio of means.
        columns: each float64 [N]; row i of all of them is the same record.
        seed: of the drawing.
        unit: of the result.
        cut: values beyond this are cut off, because a ratio may have any size.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    value = float(np.clip(statistic(*columns, axis=-1), -cut, cut))
    count = len(columns[0])
    if count < 2:
        return Figure(value=value, low=-cut, high=cut, unit=unit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # about draws without a value
        drawn = bootstrap(
            columns,
            lambda *each, axis: np.clip(statistic(*each, axis=axis), -cut, cut),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, ROOM // count),
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).bootstrap_distribution
    low, high = np.nanquantile(drawn, ENDS)
    # The estimate may lie beyond the percentiles of a statistic that is not a mean.
    return Figure(value=value, low=min(low, value), high=max(high, value), unit=unit)
