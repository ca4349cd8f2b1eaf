"""Which answers of a record each score is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from compress.calibration.text.records import Record
from compress.evaluation.forgetting.ask import Given
from compress.evaluation.forgetting.items import Question, items_of
from compress.evaluation.forgetting.known import ask

CHANCES = {"Ghent": 0.5, "the city of Ghent": 0.4, "Bruges": 0.3, "the city of Bruges": 0.1, "Namur": 0.1}


class Words:
    """A tokenizer whose tokens are texts."""

    eos_token_id = None
    bos_token_id = None

    def decode(self, tokens: Sequence[Any], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Answers:
    """A model that gives each answer the chance in `CHANCES`, and says the first."""

    tokenizer = Words()

    def score(self, questions: Sequence[Question]) -> list[Given]:
        return [
            Given(np.full(1, math.log(CHANCES[" ".join(map(str, each.answer))])), np.ones(1, dtype=bool))
            for each in questions
        ]

    def say(self, questions: Sequence[Question]) -> list[str]:
        return ["Ghent" for _ in questions]


@pytest.fixture(autouse=True)
def texts_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question is one token, and so is an answer."""
    monkeypatch.setattr(
        "compress.evaluation.forgetting.items._question",
        lambda record, *_: Question((record.question,), (record.answer,)),
    )


@pytest.mark.parametrize(("misled", "ratio"), [(("the city of Bruges",), 0.1 / 0.4), ((), 0.2 / 0.4)])
def test_wrong_answers_are_worded_as_the_right_one(misled: tuple[str, ...], ratio: float) -> None:
    record = Record(
        "1",
        question="Where?",
        answer="Ghent",
        paraphrased_answer="the city of Ghent",
        wrong=("Bruges", "Namur"),
        paraphrased_wrong=misled,
    )
    model: Any = Answers()
    (found,) = ask(model, items_of([record], model.tokenizer, 64), "all")
    assert found.truth_ratio == pytest.approx(ratio)
    assert found.wrong_probability == pytest.approx(0.2)
    assert found.choice == 1
    assert found.probability == pytest.approx(0.5)
