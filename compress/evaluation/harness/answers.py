"""One model's answers to one task, question by question: what pairs of models are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from compress.report.scorecard import TaskAsked


@dataclass(frozen=True)
class Answers:
    """The scores of one model on one task.

    Attributes:
        asked: the task and how it was asked; two models can be paired only if theirs agree.
        questions: hash of each question, in the order in which they were asked.
        documents: hash of what each question is about; tasks that share some ask the same in different ways.
        scores: the deciding metric of each question, float64 [N] between 0 and 1, more is better.
        others: further metrics, name -> float64 [N].
        text: each question's answer as the harness kept it, to be read; empty if it was not kept.
        prompts: what the model was given for each question; empty if it was not kept.
        cut: number of questions whose beginning was cut off, because the model does not take so many tokens.
    """

    asked: TaskAsked
    questions: tuple[str, ...]
    documents: tuple[str, ...]
    scores: np.ndarray
    others: dict[str, np.ndarray]
    text: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    cut: int = 0

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1, so that flips can be counted."""
        return bool(((self.scores == 0) | (self.scores == 1)).all())
