"""Is a model worse? One decision over all tasks, in the three ways of one paper.

Source: Kübler et al., "When LLMs get significantly worse: A statistical approach to detect model
degradations" (arXiv:2602.10144), section 4. All three are one-sided, because only a loss is looked for, and
hold for any number of tasks of any size. Under the hypothesis of no change, the sign of each question's
difference is a coin: for answers that are right or wrong this is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from compress.evaluation.documents import Differences, independent

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 9_999
"""Draws of a test that is not exact, whose smallest p is 1 in 10,000."""
ENTRIES = 2**22
"""Numbers drawn at once, which bounds the memory that a test takes."""


class Ways(NamedTuple):
    """One-sided p that a model is worse, in three ways.

    Attributes:
        pooled: all questions together; sees a small loss in all tasks best.
        max_drop: the task with the largest loss by its own standard error; sees a loss in one task best.
        fisher: Fisher's combination of the p of tasks that share no documents; between the two.
    """

    pooled: float
    max_drop: float
    fisher: float

    @property
    def combined(self) -> float:
        """The p of all three, corrected for their number (Bonferroni)."""
        return min(1.0, len(self) * min(self))


def ways(tasks: Sequence[Differences], seed: int) -> Ways:
    """Test all tasks together.

    Questions that ask the same change their sign together. Only the largest loss is found as if they did not,
    which errs on the safe side: the largest of several is smaller where they rise and fall together.

    Args:
        tasks: the differences of each. Neither their order matters, nor that of the questions.
        seed: of the draws.
    """
    import numpy as np
    from scipy.stats import combine_pvalues

    groups = independent(tasks)
    each = sorted(less_p(group, seed) for group in groups)
    return Ways(
        pooled=less_p(np.concatenate(groups), seed),
        max_drop=_by_signs([task.values for task in tasks], np.negative, seed),
        fisher=float(combine_pvalues(each, method="fisher").pvalue),
    )


def less_p(differences: np.ndarray, seed: int) -> float:
    """One-sided p that the mean difference is below 0."""
    import numpy as np
    from scipy.stats import binomtest

    flips = differences[differences != 0]
    if not len(flips):
        return 1.0
    if (abs(flips) == abs(flips[0])).all():
        return float(binomtest(int((flips < 0).sum()), len(flips), alternative="greater").pvalue)
    return _by_signs([flips], np.negative, seed)


def two_sided_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p that the mean difference is not 0."""
    import numpy as np

    from compress.evaluation.task_score import mcnemar

    flips = differences[differences != 0]
    if (abs(flips) == 1).all():
        return mcnemar(int((flips < 0).sum()), int((flips > 0).sum()))
    return _by_signs([flips], np.abs, seed)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, corrected for their number by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(ps, method="holm")[1]]


def _by_signs(
    differences: Sequence[np.ndarray], sided: Callable[[np.ndarray], np.ndarray], seed: int
) -> float:
    """The p of the largest over the tasks of sided(sum d / sqrt(sum d^2)), by draws of the signs of all d."""
    import numpy as np
    from scipy.stats import monte_carlo_test

    # In an order that depends neither on that of the questions or tasks, nor on which model is the dense one.
    tasks = [np.array(sorted(task[task != 0], key=lambda d: (abs(d), d))) for task in differences]
    tasks = sorted((task for task in tasks if len(task)), key=lambda task: abs(task).tolist())
    if not tasks:
        return 1.0
    flips, starts = np.concatenate(tasks), np.cumsum([0, *map(len, tasks)])[:-1]
    deviations = np.sqrt(np.add.reduceat(flips**2, starts))
    generator = np.random.default_rng(seed)

    def drawn(size: tuple[int, ...]) -> np.ndarray:
        return abs(flips) * (2.0 * generator.integers(0, 2, size, dtype=np.int8) - 1)

    def largest(signed: np.ndarray, axis: int) -> np.ndarray:
        return sided(np.add.reduceat(signed, starts, axis=axis) / deviations).max(axis=axis)

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
