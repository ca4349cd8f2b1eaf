"""Score how well a model does its task, and test whether it differs from the dense model by more than chance.

All intervals are 95 % intervals: Wilson's for shares of independent examples, Student's t over examples for
means, and Student's t clustered by example if one example has several words (Cochran, Sampling Techniques,
section 6.3), because the words of a sentence are not independent. The paired test against the dense model is
McNemar's exact test on examples: if b of them are right for the dense model only and c for the compressed one
only, p is two-sided binomial, min(b, c) of b + c at 1/2.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from compress.calibration.text.examples import QuestionExample, WordsExample
from compress.evaluation.statistics import mean_by_window, wilson
from compress.report.scorecard import Figure, TaskScore

if TYPE_CHECKING:
    from compress.calibration.text.examples import TaskFile

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class _Marked:
    """The predictions of one model, marked.

    Attributes:
        metrics: name of a metric of `TaskScore` -> its figure.
        right: whether each example is wholly right.
        given: each example's predictions, in a form that can be compared between models.
    """

    metrics: dict[str, Figure]
    right: list[bool]
    given: list[Any]


def score(file: TaskFile, dense: Sequence[Any], model: Sequence[Any] | None, flops: Figure) -> TaskScore:
    """Score ``model`` against the dense model, or the dense model itself if ``model`` is None.

    Args:
        file: the examples with the right answers.
        dense, model: each example's prediction: a label (sequence classification), a dictionary of word
            number -> label without words that were cut off (token classification), or the text of an answer.
        flops: FLOPs of the scored model for one input.
    """
    mark = MARKS[file.task]
    expected = mark(file, dense)
    if model is None:
        return TaskScore(
            **expected.metrics, agreement=Figure(value=1, unit="fraction"), flops=flops, gained=0, lost=0
        )
    found = mark(file, model)
    pairs = list(zip(expected.right, found.right, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return TaskScore(
        **found.metrics,
        agreement=_agreement(expected.given, found.given),
        flops=flops,
        gained=gained,
        lost=lost,
        mcnemar_p=Figure(value=mcnemar(lost, gained)),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of McNemar's test, from the examples that only one of the two models gets right."""
    from scipy.stats import binomtest

    return float(binomtest(min(lost, gained), lost + gained).pvalue) if lost + gained else 1.0


def macro_f1(right: Sequence[int], given: Sequence[int]) -> float:
    """Mean over the labels that occur in ``right`` of 2 TP / (2 TP + FP + FN)."""
    import numpy as np

    wanted, found = np.asarray(right), np.asarray(given)
    scores = [
        2 * np.sum((wanted == label) & (found == label)) / (np.sum(wanted == label) + np.sum(found == label))
        for label in np.unique(wanted)
    ]
    return float(np.mean(scores))


def normalized(answer: str) -> str:
    """Normalise an answer as SQuAD does: lower case, without punctuation, articles and extra white space."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def token_f1(answer: str, right: str) -> float:
    """SQuAD's F1 of two answers: the harmonic mean of the shares of normalised words that they share."""
    given, wanted = normalized(answer).split(), normalized(right).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def _mark_labels(file: TaskFile, predictions: Sequence[int]) -> _Marked:
    right = [given == example.label for given, example in zip(predictions, file.examples, strict=True)]
    return _Marked({"accuracy": wilson(sum(right), len(right))}, right, [[given] for given in predictions])


def _mark_words(file: TaskFile, predictions: Sequence[dict[int, int]]) -> _Marked:
    """Mark the words that have a prediction; the inputs of all models are cut in the same places."""
    examples: tuple[WordsExample, ...] = file.examples
    given = [list(found.values()) for found in predictions]
    labels = [example.labels or () for example in examples]
    wanted = [[right[word] for word in found] for found, right in zip(predictions, labels, strict=True)]
    return _Marked(
        {
            "accuracy": _shares(wanted, given),
            "macro_f1": Figure(value=macro_f1([*chain(*wanted)], [*chain(*given)]), unit="fraction"),
        },
        [one == other for one, other in zip(wanted, given, strict=True)],
        given,
    )


def _mark_answers(file: TaskFile, predictions: Sequence[str]) -> _Marked:
    """Mark each answer by the right answer that suits it best; if there is none, only "" is right."""
    examples: tuple[QuestionExample, ...] = file.examples
    exact, f1 = [], []
    for given, example in zip(predictions, examples, strict=True):
        answers = example.answers or ("",)
        exact.append(normalized(given) in {normalized(answer) for answer in answers})
        f1.append(max(token_f1(given, answer) for answer in answers))
    return _Marked(
        {"exact_match": wilson(sum(exact), len(exact)), "f1": _mean(f1, [1] * len(f1))},
        exact,
        [[normalized(given)] for given in predictions],
    )


MARKS: dict[str, Callable[[TaskFile, Sequence[Any]], _Marked]] = {
    "sequence classification": _mark_labels,
    "token classification": _mark_words,
    "question answering": _mark_answers,
}


def _agreement(dense: list[list[Any]], model: list[list[Any]]) -> Figure:
    """The share of equal predictions."""
    if all(len(given) == 1 for given in dense):
        return wilson(sum(one == other for one, other in zip(dense, model, strict=True)), len(dense))
    return _shares(dense, model)


def _shares(wanted: list[list[Any]], given: list[list[Any]]) -> Figure:
    """The share of equal entries, clustered by list."""
    equal = [
        sum(one == other for one, other in zip(*pair, strict=True))
        for pair in zip(wanted, given, strict=True)
    ]
    return _mean(equal, [len(each) for each in wanted])


def _mean(sums: Sequence[float], counts: Sequence[int]) -> Figure:
    mean = mean_by_window(list(sums), list(counts))
    return mean.figure(lambda value: min(max(value, 0.0), 1.0), unit="fraction")
