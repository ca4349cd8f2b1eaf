"""Is a model worse? One decision over all tasks, in the three ways of one paper.

Source: Kübler et al., "When LLMs get significantly worse: A statistical approach to detect model
degradations" (arXiv:2602.10144), section 4. All three are one-sided, because only a loss is looked for, and
hold for any number of tasks of any size. Under the hypothesis of no change, the sign of each question's
difference is a coin: for answers that are right or wrong this is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 9_999
"""Draws of a test that is not exact; its p is at least 1 in so many and one."""
ENTRIES = 2**22
"""Numbers drawn at once, which bounds the memory that a test takes."""


class Ways(NamedTuple):
    """One-sided p that a model is worse, in three ways.

    Attributes:
        pooled: all questions together; sees a small loss in all tasks best.
        max_drop: the task with the largest loss by its own standard error; sees a loss in one task best.
        fisher: Fisher's combination of the p of each task; between the two.
    """

    pooled: float
    max_drop: float
    fisher: float

    @property
    def combined(self) -> float:
        """The p of all three, corrected for their number (Bonferroni)."""
        return min(1.0, len(self) * min(self))


def ways(differences: Sequence[np.ndarray], seed: int) -> Ways:
    """Test all tasks together.

    Args:
        differences: for each task, the scores minus the dense model's, [N]. Their order does not matter.
        seed: of the draws.
    """
    import numpy as np
    from scipy.stats import combine_pvalues

    each = [less_p(task, seed) for task in differences]
    return Ways(
        pooled=less_p(np.concatenate(differences), seed),
        max_drop=max_drop_p(differences, seed),
        fisher=float(combine_pvalues(each, method="fisher").pvalue),
    )


def less_p(differences: np.ndarray, seed: int) -> float:
    """One-sided p that the mean difference is below 0."""
    from scipy.stats import binomtest

    flips = flipped(differences)
    if not len(flips):
        return 1.0
    if (abs(flips) == 1).all():
        return float(binomtest(int((flips < 0).sum()), len(flips), alternative="greater").pvalue)
    return _signs(flips, "less", seed)


def two_sided_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p that the mean difference is not 0."""
    from compress.evaluation.task_score import mcnemar

    flips = flipped(differences)
    if (abs(flips) == 1).all():
        return mcnemar(int((flips < 0).sum()), int((flips > 0).sum()))
    return _signs(flips, "two-sided", seed)


def flipped(differences: np.ndarray) -> np.ndarray:
    """The differences that are not 0, in an order that does not depend on that of the questions."""
    import numpy as np

    return np.sort(differences[differences != 0])


def _signs(flips: np.ndarray, alternative: str, seed: int) -> float:
    """The p of the mean under random signs, which is exact if there are few."""
    import numpy as np
    from scipy.stats import permutation_test

    return float(
        permutation_test(
            (flips,),
            np.mean,
            permutation_type="samples",
            alternative=alternative,
            n_resamples=RESAMPLES,
            batch=max(1, ENTRIES // len(flips)),
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def max_drop_p(differences: Sequence[np.ndarray], seed: int) -> float:
    """One-sided p of the largest over the tasks of -sum d / sqrt(sum d^2), by draws of the signs."""
    import numpy as np
    from scipy.stats import monte_carlo_test

    # Tasks of one size and one set of differences are alike, so their order does not matter either.
    tasks = sorted(
        (flips for task in differences if len(flips := flipped(task))), key=lambda task: task.tolist()
    )
    if not tasks:
        return 1.0
    flips, starts = np.concatenate(tasks), np.cumsum([0, *map(len, tasks)])[:-1]
    deviations = np.sqrt(np.add.reduceat(flips**2, starts))
    generator = np.random.default_rng(seed)

    def drawn(size: tuple[int, ...]) -> np.ndarray:
        return abs(flips) * (2.0 * generator.integers(0, 2, size, dtype=np.int8) - 1)

    def largest(signed: np.ndarray, axis: int) -> np.ndarray:
        return (-np.add.reduceat(signed, starts, axis=axis) / deviations).max(axis=axis)

    return float(
        monte_carlo_test(
            flips,
            drawn,
            largest,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, ENTRIES // len(flips)),
            alternative="greater",
        ).pvalue
    )
