from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.evaluation import pairs as module
from compress.evaluation import pooled
from compress.evaluation.harness.answers import Answers
from compress.evaluation.pairs import alone, judge
from compress.report.scorecard import Harness

from .common import answers, flips

MARGIN = 0.01


@pytest.fixture
def few_draws():
    """Draws that are too few to decide, but enough to be the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "RESAMPLES", 99)
        patch.setattr(module, "RESAMPLES", 99)
        patch.setattr("gc.collect", lambda *_: 0)  # which statsmodels calls, and torch makes slow
        yield


binary = st.integers(0, 1).map(float)
partial = st.integers(0, 8).map(lambda eighths: eighths / 8)


@st.composite
def pairs(draw) -> list[tuple[Answers, Answers]]:
    """Two models' answers to up to three tasks, right or wrong or with partial scores."""
    tasks = []
    for number in range(draw(st.integers(1, 3))):
        score = draw(st.sampled_from([binary, partial]))
        both = draw(st.lists(st.tuples(score, score), min_size=1, max_size=12))
        tasks.append(tuple(answers(scores, f"task{number}") for scores in zip(*both)))
    return tasks


def judged(tasks: list[tuple[Answers, Answers]], seed: int = 0) -> Harness:
    return judge([dense for dense, _ in tasks], [model for _, model in tasks], MARGIN, seed)


def ps(harness: Harness) -> list[float]:
    found = harness.verdict
    of_tasks = [p.value for task in harness.tasks for p in (task.p, task.holm_p)]
    of_all = (found.worse_p, found.margin_p, found.pooled_p, found.max_drop_p, found.fisher_p)
    return of_tasks + [p.value for p in of_all]


@pytest.mark.usefixtures("few_draws")
@given(pairs())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_p_is_a_probability(tasks: list):
    harness = judged(tasks)
    assert all(0 <= p <= 1 for p in ps(harness))
    assert all(task.holm_p.value >= task.p.value for task in harness.tasks)
    assert (
        harness.verdict.worse_p.value >= harness.verdict.pooled_p.value or harness.verdict.worse_p.value < 1
    )
    assert (harness.verdict.needed is None) == (harness.verdict.kind != "undecided")
    assert harness.verdict.needed is None or harness.verdict.needed > harness.verdict.questions


@pytest.mark.usefixtures("few_draws")
@given(pairs())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_swapping_the_models_turns_every_sign(tasks: list):
    one, other = judged(tasks), judged([(model, dense) for dense, model in tasks])
    assert one.verdict.change.value == pytest.approx(-other.verdict.change.value, abs=1e-12)
    assert one.verdict.change.low == pytest.approx(-other.verdict.change.high, abs=1e-9)
    for there, back in zip(one.tasks, other.tasks):
        assert there.change.value == pytest.approx(-back.change.value, abs=1e-12)
        assert there.p.value == pytest.approx(back.p.value)
        assert there.flips == back.flips
        assert (there.lost, there.gained) == (back.gained, back.lost)
        assert there.standard_error == pytest.approx(back.standard_error)


@pytest.mark.usefixtures("few_draws")
@given(pairs(), st.randoms(use_true_random=False))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_matters(tasks: list, random):
    shuffled = []
    for pair in tasks:
        order = random.sample(range(len(pair[0].scores)), len(pair[0].scores))
        shuffled.append(tuple(answers(each.scores[order], each.asked.task) for each in pair))
    random.shuffle(shuffled)
    one, other = judged(tasks), judged(shuffled)
    assert one.verdict == other.verdict
    assert {task.task: task for task in one.tasks} == {task.task: task for task in other.tasks}


def test_the_dense_model_against_itself():
    tasks = [answers(flips(500, 0, 0)[0], f"kick_{number}") for number in range(6)]
    harness = judge(tasks, tasks, MARGIN, seed=0)
    assert all(
        task.lost == task.gained == task.flips.value == task.change.value == 0 for task in harness.tasks
    )
    assert all(task.p.value == task.holm_p.value == 1 and task.matching for task in harness.tasks)
    assert harness.verdict.kind == "not worse"
    assert harness.verdict.worse_p.value == 1
    assert harness.verdict.sentence == (
        "Not worse than the dense model by more than 1 point: its score changes by 0.00 ± 0.13 points on "
        "3,000 questions of 6 tasks."
    )
    assert harness.warnings == ()


def test_no_flips_on_few_questions_prove_little():
    """A model that loses 1 % of all answers loses none of 100 in 37 % of all cases."""
    same = [answers(flips(100, 0, 0)[0])]
    found = judge(same, same, MARGIN, seed=0).verdict
    assert found.kind == "undecided"
    assert found.change.low < -0.02
    assert found.needed == 268  # so many without a flip are "not worse"
    for questions, kind in ((267, "undecided"), (268, "not worse")):
        same = [answers(flips(questions, 0, 0)[0])]
        assert judge(same, same, MARGIN, seed=0).verdict.kind == kind


def test_three_verdicts():
    def verdict(lost: int, gained: int):
        dense, model = flips(2000, lost, gained)
        return judge([answers(dense)], [answers(model)], MARGIN, seed=0).verdict

    worse, fine, unknown = verdict(150, 60), verdict(20, 22), verdict(70, 60)
    assert worse.kind == "worse"
    assert worse.sentence == (
        "Worse than the dense model: its score changes by −4.5 ± 1.4 points on 2,000 questions, and "
        "kick_factoid loses more than 1 point (p < 0.0001)."
    )
    assert fine.kind == "not worse"
    assert unknown.kind == "undecided"
    assert 14_900 < unknown.needed < 17_000
    assert "about 15,000 more questions like these would decide." in unknown.sentence


def test_a_small_loss_can_be_certain_and_still_within_the_margin():
    dense, model = flips(20_000, 100, 20)  # 0.4 of a point
    found = judge([answers(dense)], [answers(model)], MARGIN, seed=0).verdict
    assert found.kind == "not worse"
    assert found.sentence.endswith("; a smaller loss is certain (p < 0.0001).")


def test_a_broken_task_is_not_outvoted():
    fine = [answers(flips(4000, 10, 12)[0], f"fine{number}") for number in range(3)]
    dense, model = flips(200, 60, 5)
    found = judge(
        [*fine, answers(dense, "broken")], [*fine, answers(model, "broken")], MARGIN, seed=0
    ).verdict
    assert found.margin_p.value < 0.05  # all questions together
    assert found.kind == "worse"
    assert found.broken == ("broken",)
    assert "and broken loses more than 1 point" in found.sentence


def test_questions_that_ask_the_same_are_no_more_evidence():
    """Such as kick_closed and kick_open, which ask for the same facts."""
    dense, model = flips(600, 30, 18)
    names = tuple(f"fact {number}" for number in range(600))
    both = [
        [answers(scores, task, documents=names) for task in ("closed", "open")] for scores in (dense, model)
    ]
    once = judge([both[0][0]], [both[1][0]], MARGIN, seed=0)
    twice = judge(*both, MARGIN, seed=0)
    assert twice.verdict.questions == 1200
    assert twice.verdict.change.low == pytest.approx(once.verdict.change.low)
    assert twice.verdict.change.high == pytest.approx(once.verdict.change.high)
    assert twice.verdict.needed == pytest.approx(2 * once.verdict.needed, abs=2)
    assert twice.verdict.standard_error == pytest.approx(once.verdict.standard_error)
    assert twice.verdict.margin_p.value == pytest.approx(once.verdict.margin_p.value)
    assert twice.verdict.pooled_p == once.verdict.pooled_p
    assert [(pair.tasks, pair.documents) for pair in twice.shared] == [(("closed", "open"), 600)]
    apart = judge(
        [answers(dense, name) for name in "ab"], [answers(model, name) for name in "ab"], MARGIN, seed=0
    )
    assert apart.shared == ()
    assert apart.verdict.standard_error == pytest.approx(once.verdict.standard_error / 2**0.5)


def test_two_lost_answers_break_no_task():
    """A model that loses 1 % of all answers loses two or more of 40 in 6 % of all cases."""
    dense, model = flips(40, 2, 0)
    found = judge([answers(dense)], [answers(model)], MARGIN, seed=0).verdict
    assert (found.kind, found.broken) == ("undecided", ())
    dense, model = flips(40, 12, 0)
    assert judge([answers(dense)], [answers(model)], MARGIN, seed=0).verdict.broken == ("kick_factoid",)


def test_a_margin_is_what_it_says():
    dense, model = flips(3000, 150, 100)  # loses 1.7 points, with an error of 0.5
    kinds = [
        judge([answers(dense)], [answers(model)], margin, seed=0).verdict.kind for margin in (0.01, 0.05)
    ]
    assert kinds == ["worse", "not worse"]


@pytest.mark.parametrize(("right", "matching"), [(95, True), (94, False), (100, True), (110, True)])
def test_matching_is_a_relative_drop_of_at_most_five_percent(right: int, matching: bool):
    dense = answers([1] * 100 + [0] * 100)
    model = answers([1] * right + [0] * (200 - right))
    assert judge([dense], [model], MARGIN, seed=0).tasks[0].matching is matching


def test_scores_between_right_and_wrong_are_bootstrapped():
    random = np.random.default_rng(1)
    before = random.beta(2, 3, size=300)
    after = np.clip(before - 0.02 + random.normal(0, 0.05, size=300), 0, 1)
    harness = judge([answers(before)], [answers(after)], MARGIN, seed=0)
    task = harness.tasks[0]
    assert task.lost is task.gained is task.flips is None
    assert task.change.low < task.change.value < task.change.high < 0
    assert task.change.high - task.change.low == pytest.approx(3.92 * task.standard_error, rel=0.1)
    assert task.p.value < 0.001
    assert harness == judge([answers(before)], [answers(after)], MARGIN, seed=0)
    assert harness != judge([answers(before)], [answers(after)], MARGIN, seed=1)


def test_a_mean_without_spread_has_no_interval():
    same = answers([0.5] * 30, others={"length": np.full(30, 7.0)})
    result = alone([same]).tasks[0]
    assert (result.score.value, result.score.low) == (0.5, None)
    assert (result.others["length"].value, result.others["length"].unit) == (7.0, "")


@pytest.mark.parametrize(
    "other",
    [
        {"sha256": "1" * 64},
        {"fewshot": 5},
        {"metric": "acc"},
        {"questions": ("other", "questions", "than", "those")},
    ],
)
def test_answers_to_other_questions_are_refused(other: dict):
    with pytest.raises(
        BadInput, match="different questions of 'kick_factoid', or in different ways; evaluate"
    ):
        judge([answers([1, 0, 1, 0])], [answers([1, 0, 1, 0], **other)], MARGIN, seed=0)


def test_other_tasks_are_refused():
    with pytest.raises(BadInput, match="different tasks"):
        judge([answers([1, 0])], [answers([1, 0], "other")], MARGIN, seed=0)
    with pytest.raises(BadInput, match="no answers"):
        alone([])


@pytest.mark.parametrize("margin", [0, 1, -0.01, float("nan")])
def test_margins_that_are_none_are_refused(margin: float):
    with pytest.raises(BadInput, match=r"is not between 0 and 1; 0\.01 is one point"):
        judge([answers([1, 0])], [answers([1, 0])], margin, seed=0)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_scores_that_are_none_are_refused(score: float):
    with pytest.raises(BadInput, match="not between 0 and 1"):
        alone([answers([1, score])])


def test_the_dense_model_alone_has_no_verdict():
    harness = alone([answers([1, 1, 0, 1], others={"f1": np.array([1, 0.5, 0.25, 1])})])
    assert harness.verdict is None
    assert harness.tasks[0].score.value == 0.75
    assert harness.tasks[0].others["f1"].value == 0.6875
    assert harness.tasks[0].change is None
