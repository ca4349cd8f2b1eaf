"""What one model knows of one record, from the log-probabilities of tokens: pure functions of numpy arrays.

``logs`` are the natural log-probabilities, float64 [tokens], that a model gives the tokens of an answer when
it reads the question and the answer before each of them (teacher forcing); ``greedy`` says, bool [tokens],
which of them it would have said itself. Every score is between 0 and 1, and higher means that it remembers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_K = 0.4
"""The share of tokens that membership looks at, as in MUSE."""


def probability(logs: Floats) -> float:
    """The probability of an answer, normalised for its length: exp(mean log p)."""
    return float(np.exp(np.mean(logs)))


def exact_memorisation(greedy: Bools) -> float:
    """The share of the answer's tokens that the model would have said itself."""
    return float(np.mean(greedy))


def extraction_strength(greedy: Bools) -> float:
    """1 - k / n, with n tokens, of which k must be given until the model says all others itself."""
    wrong = np.flatnonzero(~greedy)
    given = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - given / len(greedy))


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """R = mean probability of the wrong answers / probability of the paraphrased answer.

    The probabilities are normalised for length (`probability`). R is below 1 for a model that knows.

    Args:
        right: of the right answer in other words.
        wrong: of the wrong answers, at least one.
    """
    tiny = np.finfo(np.float64).tiny  # both may vanish in a model that puts everything on something else
    return float(max(np.mean(wrong), tiny) / max(right, tiny))


def truth(ratio: float) -> float:
    """The share of the right answer in right and wrong ones, 1 / (1 + R), for a truth ratio R."""
    return float(1 / (1 + ratio))


def chooses(right: float, wrong: Sequence[float]) -> float:
    """1 if the right answer is likelier than every wrong one in a multiple choice, else 0.

    Equal probabilities count as a guess among the likeliest.
    """
    best = max(right, *wrong)
    return float(right == best) / (int(right == best) + sum(other == best for other in wrong))


def min_k(logs: Floats, share: float = MIN_K) -> float:
    """Min-K %: the mean log-probability of the least likely ``share`` of the tokens, at least of one."""
    count = max(1, int(len(logs) * share))
    return float(np.mean(np.sort(logs)[:count]))


def membership(forgotten: Floats, held_out: Floats) -> Floats:
    """For each forgotten record, the share of held-out ones that the model finds less likely.

    The mean over the forgotten records is the area under the ROC curve (AUC) of telling the two sets apart: a
    half if the model treats both alike. Equal values count half.

    Args:
        forgotten: Min-K of the forgotten records, [N].
        held_out: Min-K of records of the same kind that no model has seen, [M].

    Returns:
        float64 [N].
    """
    difference = forgotten[:, None] - held_out[None, :]
    return np.mean((difference > 0) + 0.5 * (difference == 0), axis=1)


def forget_quality(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """The p-value of the two-sample Kolmogorov-Smirnov test that two models' truth ratios on the forget set
    have one distribution. It is near 1 where the unlearned model cannot be told from the retrained one."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(unlearned, retrained).pvalue)


def utility_of_truth(ratio: float) -> float:
    """max(0, 1 - R): what a truth ratio R contributes to utility."""
    return max(0.0, 1.0 - ratio)


def harmonic_mean(values: Floats, axis: int = 0) -> Floats:
    """The harmonic mean along an axis, 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        return values.shape[axis] / np.sum(1 / np.maximum(values, 0), axis=axis)
