"""Questions of several tasks that ask the same, whose answers rise and fall together.

Each question is made of a document. Two tasks may ask about the same ones, such as a question with and
without the passage that answers it. Those answers are no independent evidence, so each document counts once
where tasks are tested together, and the covariance of the tasks counts where their error is stated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from compress.evaluation.margin import Moments
from compress.report.scorecard import Shared

if TYPE_CHECKING:
    import numpy as np


class Differences(NamedTuple):
    """What a model's scores on one task differ by from the dense model's.

    Attributes:
        task: its name.
        documents: hash of each question's document.
        values: the scores minus the dense model's, [N].
    """

    task: str
    documents: Sequence[str]
    values: np.ndarray

    def sums(self, mean: float = 0.0) -> defaultdict[str, float]:
        """The sum over each document of the differences from ``mean``."""
        found: defaultdict[str, float] = defaultdict(float)
        for document, value in zip(self.documents, self.values.tolist(), strict=True):
            found[document] += value - mean
        return found


def shared(tasks: Sequence[Differences]) -> tuple[Shared, ...]:
    """The pairs of tasks that ask about the same documents, with the covariance of their mean differences.

    With N and N' questions, means m and m', and the sums over the documents k that both ask about, it is
    sum_k (d_k - m) (d'_k - m') / (N N').
    """
    found = []
    centred = [(each, each.sums(Moments.of(each.values).mean)) for each in tasks]
    for (one, of_one), (other, of_other) in combinations(centred, 2):
        if both := of_one.keys() & of_other.keys():
            products = math.fsum(of_one[document] * of_other[document] for document in both)
            covariance = products / (len(one.values) * len(other.values))
            found.append(Shared(tasks=(one.task, other.task), documents=len(both), covariance=covariance))
    return tuple(found)


def independent(tasks: Sequence[Differences]) -> list[np.ndarray]:
    """The sum of the differences over each document: one array for all tasks that share any, [documents]."""
    import numpy as np

    groups: list[defaultdict[str, float]] = []
    for task in tasks:
        sums = task.sums()
        apart: list[defaultdict[str, float]] = []
        for group in groups:
            if group.keys().isdisjoint(sums):
                apart.append(group)
                continue
            for document, value in group.items():
                sums[document] += value
        groups = [*apart, sums]
    return [np.array(list(group.values())) for group in groups]
