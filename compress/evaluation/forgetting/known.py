"""What one model knows of each record of a set: all scores of one record, and columns of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from compress.evaluation.forgetting import metrics
from compress.evaluation.forgetting.ask import Asked, Given
from compress.evaluation.forgetting.items import Item, Question, words_of
from compress.evaluation.forgetting.metrics import Floats
from compress.evaluation.forgetting.words import first_line, is_refusal, rouge_recall
from compress.report.scorecard import Document

Aspect = Literal["tokens", "use", "all"]
"""What to ask of a set: likelihoods alone (holdout), what makes up utility (retain, world), or everything."""

WAYS = (
    "probability",
    "rouge",
    "extraction",
    "memorisation",
    "truth",
    "choice",
    "paraphrase",
    "prefilled",
)
"""The scores of a record that make up what is known of it. All are between 0 and 1."""

MEMBERSHIP = "membership"


class Known(Document):
    """What one model knows of one record. None stands for what was not asked, or what the record lacks.

    Attributes:
        probability: of the answer, normalised for length.
        extraction, memorisation: `metrics.extraction_strength` and `metrics.exact_memorisation`.
        min_k: Min-K of the answer, in nats.
        said: the greedy answer.
        refused: whether that is a refusal.
        rouge: ROUGE-L recall of the answer in what was said.
        truth_ratio: wrong answers against the right one, both in the words of the paraphrased answer.
        wrong_probability: mean probability of the wrong answers.
        choice: whether the answer is chosen among the wrong ones.
        paraphrase: mean ROUGE-L recall where the question is put in other words.
        prefilled: ROUGE-L recall of the rest of an answer that is begun.
    """

    id: str
    probability: float
    extraction: float
    memorisation: float
    min_k: float
    said: str | None = None
    refused: bool | None = None
    rouge: float | None = None
    truth_ratio: float | None = None
    wrong_probability: float | None = None
    choice: float | None = None
    paraphrase: float | None = None
    prefilled: float | None = None

    @property
    def truth(self) -> float | None:
        """1 / (1 + truth ratio): higher for a model that knows."""
        return None if self.truth_ratio is None else metrics.truth(self.truth_ratio)


def ask(asked: Asked, items: Sequence[Item], aspect: Aspect) -> list[Known]:
    """Ask a model for every record.

    Raises:
        CompressError: the model puts out NaN, or rouge-score is not installed.
    """
    questions = [item.asked for item in items]
    alternatives = [other for item in items for other in _alternatives(item)]
    wanted = questions if aspect == "tokens" else [*questions, *alternatives]
    given = dict(zip(wanted, asked.score(wanted), strict=True))
    said: dict[Question, str] = {}
    if aspect != "tokens":
        ways = [_spoken(item, aspect) for item in items]
        prompts = [question for several in ways for question in several]
        said = dict(zip(prompts, asked.say(prompts), strict=True))
    return [_known(item, aspect, given, said, asked) for item in items]


def _alternatives(item: Item) -> tuple[Question, ...]:
    """Other answers than the one that was learned."""
    return (item.paraphrased, *item.wrong, *item.misled) if item.misled else ()


def _spoken(item: Item, aspect: Aspect) -> list[Question]:
    """The questions that the model answers in its own words."""
    if aspect == "use":
        return [item.asked]
    return [item.asked, *item.rephrased, *([item.begun] if item.begun else [])]


def _known(
    item: Item, aspect: Aspect, given: dict[Question, Given], said: dict[Question, str], asked: Asked
) -> Known:
    logs, greedy = given[item.asked]
    found = Known(
        id=item.id,
        probability=metrics.probability(logs),
        extraction=metrics.extraction_strength(greedy),
        memorisation=metrics.exact_memorisation(greedy),
        min_k=metrics.min_k(logs),
    )
    if aspect == "tokens":
        return found
    spoken = first_line(said[item.asked], item.text)
    more: dict[str, object] = {
        "said": spoken,
        "refused": is_refusal(spoken),
        "rouge": rouge_recall(item.text, spoken),
    }
    if item.misled:
        right, *misled = (metrics.probability(given[each].logs) for each in (item.paraphrased, *item.misled))
        more["truth_ratio"] = metrics.truth_ratio(right, misled)
    if item.wrong:
        wrong = [metrics.probability(given[other].logs) for other in item.wrong]
        more["wrong_probability"] = float(np.mean(wrong))
        more["choice"] = metrics.chooses(found.probability, wrong)
    if aspect == "all":
        heard = [rouge_recall(item.text, first_line(said[each], item.text)) for each in item.rephrased]
        more["paraphrase"] = float(np.mean(heard)) if heard else None
        if item.begun is not None:
            rest = words_of(item.begun.answer, asked.tokenizer)
            more["prefilled"] = rouge_recall(rest, first_line(said[item.begun], item.text))
    return found.model_copy(update=more)


def columns(known: Sequence[Known], held_out: Sequence[Known] = ()) -> dict[str, Floats]:
    """The scores of a set as columns, float64 [N]; NaN where a record lacks one.

    Args:
        known: what a model knows of the forget set.
        held_out: what the same model knows of records that no model has seen; with them there is the column
            of membership.
    """
    found = {name: _column(getattr(each, name) for each in known) for name in WAYS}
    if held_out:
        found[MEMBERSHIP] = metrics.membership(
            _column(each.min_k for each in known), _column(each.min_k for each in held_out)
        )
    return found


def knowledge(found: Mapping[str, Floats]) -> Floats:
    """What is known of each record on the whole: the mean of all ways to ask for it, float64 [N]; NaN for a
    record that lacks them all."""
    scores = np.stack([found[name] for name in WAYS])
    there = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        return np.where(there, scores, 0.0).sum(0) / there.sum(0)


def _column(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
