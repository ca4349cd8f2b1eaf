"""From what lm-eval logged about a task to the scores of its questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from compress.errors import BadInput
from compress.evaluation.harness.answers import Answers
from compress.evaluation.harness.cache import Rows
from compress.evaluation.harness.tasks import Questions
from compress.report.scorecard import TaskAsked

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "perplexity")


def rows(questions: Questions, samples: list[dict[str, Any]], is_cut: Callable[[Any], bool]) -> Rows:
    """One row for each question: its document, prompts, answer, and the number that each metric gives it.

    Args:
        questions: what was asked.
        samples: what lm-eval logged: for each filter of the task, one for each question.
        is_cut: whether the model does not take the whole of a request.
    """
    by_document = defaultdict(list)
    for sample in samples:
        by_document[sample["doc_id"]].append(sample)
    filters = len({sample["filter"] for sample in samples})
    aggregations = questions.task.aggregation()
    return [
        {
            "question": question,
            "doc": group[0]["doc"],
            "target": group[0]["target"],
            "prompts": list(dict.fromkeys(str(each[0]) for each in group[0]["arguments"])),
            "cut": any(map(is_cut, group[0]["arguments"])),
            "answer": _answer(group[0], choices),
            "responses": group[0]["filtered_resps"],
            "scores": {
                metric if filters == 1 else f"{metric},{sample['filter']}": number(
                    sample[metric], aggregations.get(metric)
                )
                for sample in group
                for metric in sample["metrics"]
            },
        }
        for question, choices, (_, group) in zip(
            questions.hashes, questions.choices, sorted(by_document.items()), strict=True
        )
    ]


def _answer(sample: dict[str, Any], choices: int) -> str:
    """What the model said; or the likeliest of several continuations; or how likely the only one is."""
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        return str(responses[0])
    likelihoods = [each[0] if isinstance(each, list | tuple) else each for each in responses[:choices]]
    if len(likelihoods) > 1 and all(isinstance(each, float) for each in likelihoods):
        return str(sample["arguments"][int(np.argmax(likelihoods))][-1]).strip()
    return str(likelihoods[0])


def number(value: Any, aggregation: Callable[..., Any] | None) -> float:
    """The number that a metric gives to one question; NaN where it gives none.

    lm-eval keeps pairs for metrics that are taken over all questions. A right and a given label count as 1 if
    they are equal; of anything else the metric is taken over this one question.
    """
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(x, int | np.integer) for x in value)
    ):
        return float(value[0] == value[1])
    try:
        return float(aggregation([value])) if aggregation else math.nan
    except (TypeError, ValueError, ArithmeticError):
        return math.nan


def answers(questions: Questions, found: Rows) -> Answers:
    """The answers of a model to a task.

    The deciding metric is the one that the task's file names in its metadata as ``decides``. Without it, it
    is the first that is between 0 and 1 and better the larger it is; and where there is only a perplexity,
    it is the inverse of that: the mean probability of a token, word or byte.

    Raises:
        BadInput: no metric of the task decides.
    """
    names = found[0]["scores"]
    scores = {name: np.array([row["scores"].get(name, math.nan) for row in found]) for name in names}
    metric, values = _deciding(questions, scores)
    asked = TaskAsked(
        task=questions.name,
        sha256=questions.sha256,
        questions=len(found),
        fewshot=questions.fewshot,
        metric=metric,
        chance=_chance(questions, metric),
    )
    others = {name: x for name, x in scores.items() if name != metric and np.isfinite(x).all()}
    return Answers(
        asked,
        questions.hashes,
        questions.documents,
        values,
        others,
        text=tuple(str(row["answer"]) for row in found),
        prompts=tuple("\n".join(row["prompts"]) for row in found),
        cut=sum(row.get("cut", False) for row in found),
    )


def _deciding(questions: Questions, scores: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    wanted = questions.metadata("decides")
    better = questions.task.higher_is_better()
    for name, values in scores.items():
        bare = name.partition(",")[0]
        more = better.get(bare, True)
        chosen = wanted in (name, bare) and more is not False if wanted else more
        if chosen and ((values >= 0) & (values <= 1)).all():
            return name, values
    for name in PERPLEXITIES:
        if wanted in (None, name) and name in scores and (scores[name] >= 1).all():
            return f"1/{name}", 1 / scores[name]
    raise BadInput(
        f"The task '{questions.name}' has no metric that scores each question between 0 and 1 and is better "
        f"the larger it is{f', and is named {wanted}' if wanted else ''} "
        f"(it has: {', '.join(scores) or 'none'}); "
        "name one in its file as 'metadata: {decides: NAME}'."
    )


def _chance(questions: Questions, metric: str) -> float | None:
    """The score of a guess: what the task's file says, or one of the number of choices."""
    given = questions.metadata("chance")
    if given is not None:
        return float(given)
    if questions.task.OUTPUT_TYPE == "multiple_choice" and metric in ("acc", "acc_norm", "acc_bytes"):
        return float(np.mean([1 / max(1, count) for count in questions.choices]))
    return None
