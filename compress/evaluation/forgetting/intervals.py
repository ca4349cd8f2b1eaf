"""Paired intervals: records are drawn again, and all models answer the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.report.scorecard import Figure, UnitName

CONFIDENCE = 0.95
RESAMPLES = 4999
ROOM = 2**22
"""Values of one drawn array at once, 32 MB."""

Array = NDArray[np.float64]
Statistic = Callable[..., Array]


def paired(
    statistic: Statistic, columns: Sequence[Array], seed: int, *, unit: UnitName = "", cut: float = 1e6
) -> Figure:
    """A statistic of several columns of the same records, with its bootstrapped 95 % interval (percentiles).

    Args:
        statistic: of arrays [..., N] (called with ``axis=-1``), such as a ratio of means.
        columns: each float64 [N]; row i of all of them is the same record.
        seed: of the drawing.
        unit: of the result.
        cut: values beyond this are cut off, because a ratio may have any size.
    """
    from scipy.stats import bootstrap

    value = float(np.clip(statistic(*columns, axis=-1), -cut, cut))
    count = len(columns[0])
    if count < 2:
        return Figure(value=value, low=-cut, high=cut, unit=unit)
    found = bootstrap(
        columns,
        lambda *drawn, axis: np.clip(statistic(*drawn, axis=axis), -cut, cut),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, ROOM // count),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    # The estimate may lie beyond the percentiles of a statistic that is not a mean.
    return Figure(value=value, low=min(found.low, value), high=max(found.high, value), unit=unit)
