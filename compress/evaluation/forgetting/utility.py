"""What a model is still good for: probability, ROUGE-L and truth on what it should still know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compress.evaluation.forgetting.intervals import Array, paired
from compress.evaluation.forgetting.known import Known
from compress.evaluation.forgetting.metrics import harmonic_mean, utility_of_truth
from compress.report.forgetting import Utility
from compress.report.scorecard import Figure

PARTS = ("probability", "rouge", "truth")


def parts(known: Sequence[Known]) -> dict[str, Array]:
    """Part -> what each record contributes, float64 [N]; NaN where it has no wrong answers."""

    def of_truth(each: Known) -> float:
        return np.nan if each.truth_ratio is None else utility_of_truth(each.truth_ratio)

    return {
        "probability": np.array([each.probability for each in known]),
        "rouge": np.array([each.rouge for each in known], dtype=np.float64),
        "truth": np.array([of_truth(each) for each in known]),
    }


def utility(
    unlearned: Mapping[str, Sequence[Known]], target: Mapping[str, Sequence[Known]], seed: int
) -> Utility:
    """The utility of both models with paired intervals.

    It is the harmonic mean of up to six means: three parts over each set. A part is left out where no record
    of the set has it.

    Args:
        unlearned: set -> what the unlearned model knows of its records.
        target: the same of the target, with the same records.
        seed: of the bootstrap, which draws from all records of all sets.
    """
    mine, theirs = _columns(unlearned), _columns(target)
    names = list(mine)

    def mean(*columns: Array, axis: int = -1) -> Array:
        return harmonic_mean(np.stack([_mean_of_present(column, axis) for column in columns]))

    def change(*columns: Array, axis: int = -1) -> Array:
        ours, base = mean(*columns[: len(names)], axis=axis), mean(*columns[len(names) :], axis=axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(ours / base - 1)

    ours, base = list(mine.values()), list(theirs.values())
    found = paired(mean, base, seed)
    return Utility(
        unlearned=paired(mean, ours, seed),
        target=found,
        change=paired(change, [*ours, *base], seed, unit="fraction") if found.value else None,
        parts={name: Figure(value=float(np.nanmean(column))) for name, column in mine.items()},
    )


def _mean_of_present(column: Array, axis: int) -> Array:
    """The mean of what is not NaN; 0 of nothing."""
    there = np.isfinite(column)
    return np.where(there, column, 0.0).sum(axis) / np.maximum(1, there.sum(axis))


def _columns(sets: Mapping[str, Sequence[Known]]) -> dict[str, Array]:
    """``SET PART`` -> what each record of all sets contributes; NaN for those of other sets, [N]."""
    total = sum(map(len, sets.values()))
    found: dict[str, Array] = {}
    start = 0
    for name, known in sets.items():
        for part, values in parts(known).items():
            if np.isfinite(values).any():
                column = np.full(total, np.nan)
                column[start : start + len(known)] = values
                found[f"{name} {part}"] = column
        start += len(known)
    return found
