"""Made-up answers and scorecards of models that were asked questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.evaluation.harness.answers import Answers
from compress.evaluation.pairs import alone, judge
from compress.report.scorecard import Cost, HarnessProtocol, ModelIdentity, Scorecard, TaskAsked


def answers(scores: Sequence[float] | np.ndarray, task: str = "kick_factoid", **more) -> Answers:
    """Answers with these scores; ``more`` are fields of `TaskAsked` or `Answers`."""
    fields = ("text", "others", "questions", "documents")
    of_answers = {name: more.pop(name) for name in fields if name in more}
    asked = {"metric": "exact_match", "fewshot": 0, "sha256": "0" * 64, "questions": len(scores)} | more
    names = tuple(f"{task} {number}" for number in range(len(scores)))
    return Answers(
        TaskAsked(task=task, **asked),
        **{"questions": names, "documents": names, "others": {}, **of_answers},
        scores=np.asarray(scores, dtype=np.float64),
    )


def flips(questions: int, lost: int, gained: int, right: int | None = None) -> tuple[list[int], list[int]]:
    """The scores of a dense model and of another that loses and gains so many answers."""
    right = questions // 2 if right is None else right
    assert lost <= right <= questions - gained
    dense = [1] * right + [0] * (questions - right)
    model = [0] * lost + [1] * (right - lost) + [1] * gained + [0] * (questions - right - gained)
    return dense, model


def scorecards(pairs: dict[str, tuple[list[int], list[int]]], suite: str | None = "kick") -> list[Scorecard]:
    """Scorecards of a dense model and of another, from the scores of both on each task."""
    dense = [answers(scores, task) for task, (scores, _) in pairs.items()]
    model = [answers(scores, task) for task, (_, scores) in pairs.items()]
    protocol = HarnessProtocol(
        suite=suite,
        tasks=tuple(each.asked for each in dense),
        chat_template=False,
        seed=0,
        lm_eval="0.4.13",
        kernel="torch",
    )
    found = {"a": alone(dense), "b": judge(dense, model, margin=0.01, seed=0)}
    return [
        Scorecard(
            model=ModelIdentity(name={"a": "dense", "b": "small"}[letter], sha256=letter * 64),
            baseline=ModelIdentity(name="dense", sha256="a" * 64),
            harness_protocol=protocol,
            harness=harness,
            cost=Cost(weight_bytes=1000, parameters=500),
            when="2026-11-28T12:00:00Z",
            versions={},
        )
        for letter, harness in found.items()
    ]
