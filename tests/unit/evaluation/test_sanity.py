from __future__ import annotations

import numpy as np
import pytest

from compress.evaluation import sanity
from compress.evaluation.pairs import alone, judge
from compress.evaluation.sanity import above_chance_p, published

from .common import answers, flips


def right(count: int, of: int) -> list[int]:
    return [1] * count + [0] * (of - count)


def test_a_sound_model_has_no_warnings():
    texts = tuple(f"answer {number}" for number in range(200))
    assert alone([answers(right(120, 200), chance=0.25, text=texts)], name="demo").warnings == ()


@pytest.mark.parametrize(("count", "warned"), [(20, True), (50, True), (58, True), (70, False)])
def test_a_model_that_guesses_is_doubtful(count: int, warned: bool):
    warnings = alone([answers(right(count, 200), "kick_choice", chance=0.25)]).warnings
    assert bool(warnings) is warned
    if count == 50:
        assert warnings[0].startswith(
            "The dense model answers 'kick_choice' no better than by guessing (25.0 +6.4/−5.5 %, chance "
            "25 %), so the task cannot show what compression breaks; a wrong chat template"
        )


def test_chance_of_scores_that_are_not_right_or_wrong():
    random = np.random.default_rng(0)
    assert above_chance_p(answers(random.beta(4, 4, size=100), chance=0.3)) < 0.001
    assert above_chance_p(answers(random.beta(4, 4, size=100), chance=0.5)) > 0.05
    assert above_chance_p(answers([0.5] * 30, chance=0.5)) == 1
    assert above_chance_p(answers([1, 0])) is None


def test_empty_answers_are_doubtful():
    texts = ("", "  ", "\n", *["Paris", "Rome"] * 8)
    warning = alone([answers(right(10, 19), text=texts)]).warnings
    assert warning[0].startswith(
        "The dense model gives no answer to 16% of the questions of 'kick_factoid'; a"
    )
    assert alone([answers(right(10, 19), text=("", *map(str, range(18))))]).warnings == ()


def test_one_answer_to_everything_is_doubtful():
    texts = ("A",) * 29 + ("B",)
    warning = alone([answers(right(10, 30), text=texts)]).warnings
    assert "gives one and the same answer to 97% of the questions" in warning[0]
    assert alone([answers(right(5, 10), text=("A",) * 10)]).warnings == ()  # so few may be a coincidence


def test_scores_far_below_the_published_ones_are_doubtful():
    broken = answers(right(280, 1000), "arc_easy", metric="acc")
    warning = alone([broken], name="EleutherAI/pythia-160m").warnings
    assert warning == alone([broken], name="models/pythia-160m/").warnings
    assert warning[0].startswith(
        "The dense model has acc 28.0 ± 2.9 % on 'arc_easy', far below the published "
    )
    assert "github.com/EleutherAI/pythia" in warning[0]
    assert alone([answers(right(440, 1000), "arc_easy", metric="acc")], name="pythia-160m").warnings == ()
    assert (
        alone([answers(right(28, 100), "arc_easy", metric="acc", fewshot=1)], name="pythia-160m").warnings
        == ()
    )
    assert alone([broken], name="another").warnings == ()


def test_few_questions_are_not_far_below_anything():
    few = answers(right(6, 20), "arc_easy", metric="acc")
    assert alone([few], name="pythia-160m").warnings == ()


def test_other_metrics_are_compared_with_the_published_ones_too():
    found = answers(
        right(500, 1000), "arc_easy", metric="exact_match", others={"acc": np.array(right(200, 1000))}
    )
    assert "has acc 20.0" in alone([found], name="pythia-160m").warnings[0]


def test_gains_that_compression_does_not_explain():
    dense, model = flips(400, 10, 60)
    warning = judge([answers(dense)], [answers(model)], 0.01, seed=0).warnings
    assert warning[0].startswith(
        "'kick_factoid' gains 12.5 ± 4.1 points on the dense model, which compression"
    )
    few = flips(40, 1, 4)  # 7.5 points, by chance
    assert judge([answers(few[0])], [answers(few[1])], 0.01, seed=0).warnings == ()
    slight = flips(4000, 10, 100)  # 2.3 points, for sure
    assert judge([answers(slight[0])], [answers(slight[1])], 0.01, seed=0).warnings == ()


def test_the_published_scores_have_sources():
    table = sanity._table()
    assert len(table) > 200
    assert all(0 <= each.score <= 1 and each.source and "/" in each.model for each in table)
    assert {each.fewshot for each in published("EleutherAI/pythia-160m")} == {0, 5}
