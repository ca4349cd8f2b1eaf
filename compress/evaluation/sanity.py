"""What makes the answers of a model doubtful before they are compared: guesses, empty answers, odd scores.

A wrong chat template or a missing BOS token lowers every score, and a comparison with such a baseline says
little. ModelOpt's comparison gate, too, looks for a baseline far below its published score, and for gains of
more than 5 points.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from compress.evaluation.margin import LEVEL
from compress.report.scorecard import Figure, TaskResult

if TYPE_CHECKING:
    from compress.evaluation.harness.answers import Answers

FAR = 0.05
"""How far a score may lie below the published one, or a compressed model's above the dense one's."""
EMPTY = 0.1
"""Largest share of empty answers that is not worth a word."""
SAME = 0.9
"""Largest share of one and the same answer, likewise."""
FEWEST = 20
"""Questions below which the same answer may be a coincidence."""

CAUSES = "a wrong chat template, a missing BOS token or answers in another format"


class Published(NamedTuple):
    """One published score of a dense model.

    Attributes:
        model: hub id.
        task: name in lm-eval.
        fewshot: number of examples in front of each question.
        metric: name in lm-eval.
        score: between 0 and 1.
        source: where it was published.
    """

    model: str
    task: str
    fewshot: int
    metric: str
    score: float
    source: str


def doubts(answers: Sequence[Answers], results: Sequence[TaskResult], name: str = "") -> tuple[str, ...]:
    """Sentences about the dense model's own answers.

    Args:
        answers: to each task.
        results: the scores of each task.
        name: of the model, by which its published scores are found.
    """
    found = [*cut_off(answers)]
    for each, result in zip(answers, results, strict=True):
        found += [*_guesses(each, result), *_texts(each), *_far_below_published(each, result, name)]
    return tuple(found)


def cut_off(answers: Sequence[Answers]) -> tuple[str, ...]:
    """Sentences about tasks whose questions a model could not read as a whole."""
    return tuple(
        f"The beginning of {each.cut:,} of the {each.asked.questions:,} questions of '{each.asked.task}' was "
        "cut off, because the model does not take so many tokens; ask with fewer examples in front."
        for each in answers
        if each.cut
    )


def implausible(results: Sequence[TaskResult]) -> tuple[str, ...]:
    """Sentences about tasks that a compressed model does much better than the dense one."""
    return tuple(
        f"'{each.task}' gains {each.change.text} points on the dense model, which compression does not "
        "explain; check that both were asked alike, and the dense model's prompts."
        for each in results
        if each.change and each.holm_p and each.change.value > FAR and each.holm_p.value < LEVEL
    )


def above_chance_p(answers: Answers) -> float | None:
    """One-sided p that the model guesses, from McNemar's cousin for one model: the exact binomial test.

    Scores that are not right or wrong are tested by Student's t. None if the task has no chance level.
    """
    from scipy.stats import binomtest, ttest_1samp

    chance, scores = answers.asked.chance, answers.scores
    if chance is None:
        return None
    if answers.right_or_wrong:
        return float(binomtest(int(scores.sum()), len(scores), chance, alternative="greater").pvalue)
    if scores.min() == scores.max():
        return float(scores[0] <= chance)
    return float(ttest_1samp(scores, chance, alternative="greater").pvalue)


def _guesses(answers: Answers, result: TaskResult) -> Iterator[str]:
    p, chance = above_chance_p(answers), answers.asked.chance
    if p is not None and p >= LEVEL:
        yield (
            f"The dense model answers '{answers.asked.task}' no better than by guessing "
            f"({_percent(result.score)}, chance {100 * (chance or 0):.4g} %), so the task cannot show what "
            f"compression breaks; {CAUSES} look like this, too."
        )


def _texts(answers: Answers) -> Iterator[str]:
    texts = [text.strip() for text in answers.text]
    if not texts:
        return
    empty = texts.count("") / len(texts)
    if empty > EMPTY:
        yield (
            f"The dense model gives no answer to {empty:.0%} of the questions of '{answers.asked.task}'; "
            f"{CAUSES} do this."
        )
    text, times = Counter(texts).most_common(1)[0]
    if text and len(texts) >= FEWEST and times / len(texts) > SAME:
        yield (
            f"The dense model gives one and the same answer to {times / len(texts):.0%} of the questions of "
            f"'{answers.asked.task}'; {CAUSES} do this."
        )


def _far_below_published(answers: Answers, result: TaskResult, name: str) -> Iterator[str]:
    scores = {answers.asked.metric: result.score, **result.others}
    for each in published(name):
        if (each.task, each.fewshot) != (answers.asked.task, answers.asked.fewshot):
            continue
        score = scores.get(each.metric)
        if score is not None and (score.value if score.high is None else score.high) < each.score - FAR:
            yield (
                f"The dense model has {each.metric} {_percent(score)} on '{each.task}', far below the "
                f"published {100 * each.score:.4g} % ({each.source}); {CAUSES} do this."
            )


def published(name: str) -> list[Published]:
    """The published scores of a model: by its hub id, or by a folder of the same name."""
    wanted = name.rstrip("/").rpartition("/")[2].lower()
    return [each for each in _table() if each.model.rpartition("/")[2].lower() == wanted]


@cache
def _table() -> tuple[Published, ...]:
    file = resources.files("compress.evaluation") / "published.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        Published(model, task, part["fewshot"], metric, score, part["source"])
        for part in document
        for model, tasks in part["models"].items()
        for task, metrics in tasks.items()
        for metric, score in metrics.items()
    )


def _percent(figure: Figure) -> str:
    return f"{figure.text} %"
