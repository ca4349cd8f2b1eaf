"""Two models' answers to the same questions, compared pair by pair.

Right or wrong answers: flips are counted as harmful (lost) and lucky (gained), p is McNemar's exact two-sided
one, and intervals are score intervals (Wilson's for the score, Tango's for the change). Other scores: p is by
random signs of the differences and intervals are by bootstrap (BCa). Holm's correction is over the tasks.
Over all tasks, questions that ask the same count once (:mod:`compress.evaluation.documents`).
All depend on the seed only, not on the order of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.evaluation.documents import Differences, shared
from compress.evaluation.margin import Moments, change, check_margin
from compress.evaluation.pooled import ENTRIES, RESAMPLES, holm, two_sided_p, ways
from compress.evaluation.sanity import cut_off, doubts, implausible
from compress.evaluation.statistics import CONFIDENCE, wilson
from compress.evaluation.verdict import verdict
from compress.report.scorecard import Figure, Harness, TaskResult, UnitName

if TYPE_CHECKING:
    import numpy as np

    from compress.evaluation.harness.answers import Answers

MATCHING = 0.95
"""LLM-KICK's "matching" (arXiv:2310.01382): the share of the dense model's score that must be left."""


def judge(dense: Sequence[Answers], model: Sequence[Answers], margin: float, seed: int) -> Harness:
    """Compare a model with the dense one, task by task and over all tasks.

    Args:
        dense, model: their answers to the same tasks, in any order of the tasks.
        margin: the loss that does not matter, as a share of all questions: 0.01 is one point.
        seed: of bootstraps and random signs.

    Raises:
        BadInput: the two were not asked the same questions in the same way, or a score or the margin is not
            between 0 and 1.
    """
    check_margin(margin)
    pairs = _paired(dense, model)
    differences = [
        Differences(of_dense.asked.task, of_dense.documents, of_model.scores - of_dense.scores)
        for of_dense, of_model in pairs
    ]
    results, alike = _with_holm([_compared(*pair, seed) for pair in pairs]), shared(differences)
    questions = [len(each.values) for each in differences]
    return Harness(
        tasks=results,
        verdict=verdict(results, questions, alike, ways(differences, seed), margin),
        shared=alike,
        warnings=(*cut_off(model), *implausible(results)),
    )


def alone(dense: Sequence[Answers], seed: int = 0, name: str = "") -> Harness:
    """The dense model's own scores, which are compared with nothing, and what makes them doubtful.

    Args:
        dense: its answers.
        seed: of bootstraps.
        name: the model's hub id or folder, by which its published scores are found.

    Raises:
        BadInput: there is no task, or a score is not between 0 and 1.
    """
    _check(dense)
    results = tuple(_scored(answers, seed) for answers in dense)
    return Harness(tasks=results, warnings=doubts(dense, results, name))


def _paired(dense: Sequence[Answers], model: Sequence[Answers]) -> list[tuple[Answers, Answers]]:
    _check(dense)
    _check(model)
    others = {answers.asked.task: answers for answers in model}
    if set(others) != {answers.asked.task for answers in dense}:
        raise BadInput("The dense model and the other were asked different tasks; ask both the same ones.")
    pairs = [(answers, others[answers.asked.task]) for answers in dense]
    for one, other in pairs:
        if one.asked != other.asked or one.questions != other.questions:
            raise BadInput(
                f"The two models were asked different questions of '{one.asked.task}', or in different ways; "
                "evaluate both again with the same options."
            )
    return pairs


def _check(answers: Sequence[Answers]) -> None:
    if not answers:
        raise BadInput("There are no answers to compare; name at least one task.")
    for each in answers:
        if not len(each.scores) == len(each.questions) == each.asked.questions:
            raise BadInput(
                f"'{each.asked.task}' has {each.asked.questions} questions, but not as many scores."
            )
        if not ((each.scores >= 0) & (each.scores <= 1)).all():
            raise BadInput(
                f"'{each.asked.task}' has scores of '{each.asked.metric}' that are not between 0 and 1; let "
                "another of its metrics decide."
            )


def _scored(answers: Answers, seed: int) -> TaskResult:
    return TaskResult(
        task=answers.asked.task,
        score=mean(answers.scores, seed),
        others={name: mean(values, seed) for name, values in answers.others.items()},
    )


def _compared(dense: Answers, model: Answers, seed: int) -> TaskResult:
    differences = model.scores - dense.scores
    moments, binary = Moments.of(differences), dense.right_or_wrong and model.right_or_wrong
    lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
    counted = {"lost": lost, "gained": gained, "flips": wilson(lost + gained, len(differences))}
    kept = MATCHING * dense.scores.mean()
    return _scored(model, seed).model_copy(
        update={
            "change": change(moments) if binary else _bootstrapped(differences, seed, "fraction"),
            "standard_error": moments.standard_error,
            **(counted if binary else {}),
            "p": Figure(value=two_sided_p(differences, seed)),
            "matching": bool(model.scores.mean() >= kept * (1 - 1e-12)),
        }
    )


def _with_holm(results: Sequence[TaskResult]) -> tuple[TaskResult, ...]:
    corrected = holm([result.p.value for result in results if result.p])
    return tuple(
        result.model_copy(update={"holm_p": Figure(value=p)})
        for result, p in zip(results, corrected, strict=True)
    )


def mean(values: np.ndarray, seed: int) -> Figure:
    """The mean of independent values, [N]: with Wilson's interval if all are 0 or 1, else by bootstrap."""
    if ((values == 0) | (values == 1)).all():
        return wilson(int(values.sum()), len(values))
    return _bootstrapped(values, seed, "fraction" if values.min() >= 0 and values.max() <= 1 else "")


def _bootstrapped(values: np.ndarray, seed: int, unit: UnitName) -> Figure:
    """The mean with its 95 % BCa interval, or without one if all values are equal, which shows no spread."""
    import numpy as np
    from scipy.stats import bootstrap

    ordered = np.sort(values)  # of the questions, no order matters
    middle = float(ordered.mean())
    if ordered[0] == ordered[-1]:
        return Figure(value=middle, unit=unit)
    low, high = bootstrap(
        (ordered,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, ENTRIES // len(ordered)),
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Figure(value=middle, low=min(float(low), middle), high=max(float(high), middle), unit=unit)
