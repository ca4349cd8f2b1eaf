"""Paired statistics against restatements in float64, and against what they promise when repeated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from compress.evaluation.documents import Differences, shared
from compress.evaluation.margin import POWER, Moments, change, needed, not_worse_p, score_z, worse_by_p
from compress.evaluation.pooled import holm, less_p, two_sided_p, ways
from compress.evaluation.verdict import Loss, loss, together
from compress.report.scorecard import Figure, TaskResult


def differences(lost: int, gained: int, questions: int) -> np.ndarray:
    return np.array([-1.0] * lost + [1.0] * gained + [0.0] * (questions - lost - gained))


def drawn(random: np.random.Generator, questions: int, lost: float, gained: float) -> np.ndarray:
    return random.choice([-1.0, 1.0, 0.0], size=questions, p=[lost, gained, 1 - lost - gained])


def apart(tasks: list[np.ndarray]) -> list[Differences]:
    """Tasks of which no two ask about the same documents."""
    return [
        Differences(f"task{number}", [f"{number} {index}" for index in range(len(values))], values)
        for number, values in enumerate(tasks)
    ]


def alike(random: np.random.Generator, documents: int, lost: float, gained: float) -> list[Differences]:
    """A task, one that asks about half its documents and agrees three times of four, and one apart."""
    names = [f"document {number}" for number in range(documents)]
    first, second = (drawn(random, documents, lost, gained) for _ in range(2))
    second = np.where(random.random(documents) < 0.75, first, second)
    return [
        Differences("closed", names, first),
        Differences("open", names[: documents // 2], second[: documents // 2]),
        *apart([drawn(random, documents // 3, lost, gained)]),
    ]


def found(tasks: list[Differences], margin: float = 0.01) -> Loss:
    """The loss over all tasks, from what a scorecard keeps of each."""
    moments = [Moments.of(task.values) for task in tasks]
    results = [
        TaskResult(
            task=task.task,
            score=Figure(value=0.5),
            change=Figure(value=each.mean),
            standard_error=each.standard_error,
        )
        for task, each in zip(tasks, moments)
    ]
    return loss(results, [each.questions for each in moments], shared(tasks), margin)


COUNTS = [(0, 0, 20), (1, 0, 300), (0, 4, 300), (30, 12, 500), (7, 7, 40), (20, 0, 20), (260, 240, 3000)]


@pytest.mark.parametrize(("lost", "gained", "questions"), COUNTS)
def test_the_paired_standard_error(lost: int, gained: int, questions: int):
    moments = Moments.of(differences(lost, gained, questions))
    by_hand = math.sqrt(lost + gained - (lost - gained) ** 2 / questions) / questions
    assert moments.standard_error == pytest.approx(by_hand, abs=1e-12)
    back = Moments.back(questions, moments.mean, moments.standard_error)
    assert (back.lost, back.gained) == pytest.approx((lost, gained), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained", "questions"), COUNTS)
@pytest.mark.parametrize("loss", [0.01, 0.05, 0.3, -0.02])
def test_the_score_test_takes_the_likeliest_shares(lost: int, gained: int, questions: int, loss: float):
    """Found by a search over the likelihood of all pairs of shares with this difference."""

    def unlikelihood(share: float) -> float:
        shares = (share + loss, share, 1 - loss - 2 * share)
        counts = (lost, gained, questions - lost - gained)
        return -sum(count * math.log(max(at, 1e-300)) for count, at in zip(counts, shares) if count)

    bounds = (max(0.0, -loss), (1 - loss) / 2)
    share = optimize.minimize_scalar(
        unlikelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
    ).x
    z = (lost - gained - questions * loss) / math.sqrt(questions * (2 * share + loss - loss**2))
    assert score_z(lost, gained, questions, loss) == pytest.approx(z, rel=1e-4)


def test_without_a_loss_the_score_test_is_mcnemars():
    assert score_z(30, 12, 500, 0.0) == pytest.approx((30 - 12) / math.sqrt(30 + 12))


@pytest.mark.parametrize(("lost", "gained", "questions"), COUNTS)
def test_the_interval_holds_the_losses_that_the_test_does_not_reject(lost: int, gained: int, questions: int):
    figure = change(Moments.of(differences(lost, gained, questions)))
    assert figure.low <= figure.value <= figure.high
    for end, z in ((figure.low, -1.959964), (figure.high, 1.959964)):
        if abs(end) < 0.999:
            assert score_z(lost, gained, questions, -end) == pytest.approx(z, abs=1e-4)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (30, 12), (260, 240)])
def test_mcnemar_is_exact(lost: int, gained: int):
    flips = lost + gained
    total = 2**flips
    at_least = sum(math.comb(flips, k) for k in range(lost, flips + 1)) / total
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1)) / total
    both = differences(lost, gained, flips + 100)
    assert less_p(both, seed=0) == pytest.approx(at_least)
    assert two_sided_p(both, seed=0) == pytest.approx(min(1, 2 * tail))


def test_partial_scores_flip_their_signs():
    found = np.array([-0.5, -0.25, 0.125, -0.75, 0, 0.5, -0.125, 0])
    flips = found[found != 0]
    signed = [sum(s * abs(flips)) for s in itertools.product((-1, 1), repeat=len(flips))]
    at_most = np.mean([each <= flips.sum() + 1e-12 for each in signed])
    at_least = np.mean([each >= flips.sum() - 1e-12 for each in signed])
    # Three standard errors of 9,999 draws.
    assert less_p(found, seed=0) == pytest.approx(at_most, abs=0.015)
    assert two_sided_p(found, seed=0) == pytest.approx(2 * min(at_most, at_least), abs=0.015)


def test_three_ways_over_tasks():
    tasks = [differences(6, 2, 50), differences(2, 3, 80), np.array([-0.5, -0.25, 0.125, 0.0])]
    found = ways(apart(tasks), seed=0)
    assert found.fisher == pytest.approx(
        stats.chi2.sf(-2 * sum(math.log(less_p(task, seed=0)) for task in tasks), 2 * len(tasks))
    )
    each = [[abs(d) for d in task if d] for task in tasks]
    largest = max(-task.sum() / math.sqrt((task**2).sum()) for task in tasks)
    reached = [
        max(sum(s * d for s, d in zip(signs, task)) / math.hypot(*task) for signs, task in zip(signed, each))
        >= largest - 1e-12
        for signed in itertools.product(
            *[list(itertools.product((-1, 1), repeat=len(task))) for task in each]
        )
    ]
    assert found.max_drop == pytest.approx(np.mean(reached), abs=0.015)  # three errors of 9,999 draws
    assert found.combined == min(1, 3 * min(found.pooled, found.max_drop, found.fisher))


def test_holm():
    ps = [0.01, 0.04, 0.03, 0.2, 0.5]
    order = sorted(range(len(ps)), key=ps.__getitem__)
    by_hand, largest = dict.fromkeys(order, 0.0), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        by_hand[index] = largest
    assert holm(ps) == pytest.approx([by_hand[index] for index in range(len(ps))])


def test_under_the_null_the_pooled_test_rejects_at_its_level():
    """One model against itself: both sides are bootstrapped from its answers to each task."""
    random, draws = np.random.default_rng(18), 1000
    tasks = [(random.random(500) < accuracy).astype(float) for accuracy in (0.3, 0.5, 0.7)]
    rejected = 0
    for _ in range(draws):
        again = [random.choice(scores, (2, len(scores))) for scores in tasks]
        rejected += less_p(np.concatenate([model - dense for dense, model in again]), seed=0) < 0.05
    assert stats.binomtest(rejected, draws, 0.05).pvalue > 0.05
    assert rejected <= 0.065 * draws


def test_under_the_null_all_three_ways_together_reject_at_most_at_their_level():
    random, draws = np.random.default_rng(18), 150
    rejected = sum(
        ways(apart([drawn(random, 200, 0.04, 0.04) for _ in range(3)]), seed=0).combined < 0.05
        for _ in range(draws)
    )
    assert rejected / draws < 0.09  # two errors of 150 draws above the level


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.03, 0.02), (0.11, 0.10)])
def test_a_loss_of_the_margin_is_rarely_called_less_or_more(lost: float, gained: float):
    random, draws = np.random.default_rng(3), 2000
    found = [Moments.of(drawn(random, 1000, lost, gained)) for _ in range(draws)]
    assert 0.02 < sum(not_worse_p(each, 0.01) < 0.05 for each in found) / draws < 0.065
    assert 0.02 < sum(worse_by_p(each, 0.01) < 0.05 for each in found) / draws < 0.065


@pytest.mark.parametrize(
    ("questions", "lost", "gained"), [(100, 0.01, 0.005), (400, 0.06, 0.04), (50, 0.3, 0.1)]
)
def test_intervals_hold_the_truth_nineteen_times_of_twenty(questions: int, lost: float, gained: float):
    random, draws = np.random.default_rng(4), 400
    held = 0
    for _ in range(draws):
        figure = change(Moments.of(drawn(random, questions, lost, gained)))
        held += figure.low <= gained - lost <= figure.high
    assert held / draws > 0.92


@pytest.mark.parametrize(("lost", "gained"), [(0.03, 0.03), (0.033, 0.03), (0.04, 0.03)])
def test_the_questions_that_are_needed_decide_four_times_of_five(lost: float, gained: float):
    few = Moments(500, 500 * (gained - lost), 500 * (gained + lost))
    questions = needed(few, 0.01, 0.05)
    random, draws = np.random.default_rng(5), 500
    decided = 0
    for _ in range(draws):
        found = drawn(random, questions, lost, gained)
        decided += not_worse_p(Moments.of(found), 0.01) < 0.05 or less_p(found, seed=0) < 0.05
    assert decided / draws > POWER - 0.04


def test_losses_that_one_error_bar_per_model_misses():
    """0.3 of a point on 25,282 questions, as in the paper's case study, with few flips."""
    questions, lost, gained = 25_282, 260, 184
    assert less_p(differences(lost, gained, questions), seed=0) < 0.001
    accuracy = 0.5
    unpaired = (lost - gained) / questions / math.sqrt(2 * accuracy * (1 - accuracy) / questions)
    assert stats.norm.sf(unpaired) > 0.2


def test_a_loss_in_one_task_of_many():
    random = np.random.default_rng(6)
    tasks = [drawn(random, 500, 0.05, 0.05) for _ in range(9)] + [differences(45, 12, 500)]
    found = ways(apart(tasks), seed=0)
    assert found.max_drop < 0.001 < found.pooled
    assert ways(apart(tasks[:9]), seed=0).max_drop > 0.05


def test_the_error_over_tasks_that_ask_the_same_is_the_restated_one():
    """Var(sum d) = sum over all pairs of questions of the same document of the products, in Python floats."""
    tasks = alike(np.random.default_rng(7), 60, 0.2, 0.1)
    questions = [
        (document, task.task, float(value))
        for task in tasks
        for document, value in zip(task.documents, task.values)
    ]
    mean = {
        task.task: math.fsum(value for _, name, value in questions if name == task.task) / len(task.values)
        for task in tasks
    }
    middle = math.fsum(value for _, _, value in questions) / len(questions)
    variance = math.fsum((value - middle) ** 2 for _, _, value in questions)
    ordered = 0
    for (document, task, value), (other, its, another) in itertools.permutations(questions, 2):
        if document == other:
            ordered += 1
            variance += (value - mean[task]) * (another - mean[its])
    of_all = found(tasks)
    assert ordered == 2 * 30
    assert of_all.questions == len(questions) == 110
    assert of_all.moments.mean == pytest.approx(middle, abs=1e-12)
    assert of_all.moments.standard_error == pytest.approx(math.sqrt(variance) / 110, rel=1e-9)
    assert of_all.moments.questions == 110**2 // (110 + ordered)


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize(("lost", "gained", "questions"), COUNTS)
def test_a_question_asked_again_tells_nothing_new(copies: int, lost: int, gained: int, questions: int):
    (once,) = apart([differences(lost, gained, questions)])
    again = [once._replace(task=f"copy{number}") for number in range(copies)]
    before, after = found([once]), found(again)
    assert (after.questions, after.moments.questions) == (copies * questions, questions)
    for end in ("value", "low", "high"):
        assert getattr(change(after.moments), end) == pytest.approx(
            getattr(change(before.moments), end), abs=1e-9
        )
    assert after.margin_p == pytest.approx(before.margin_p, abs=1e-9)
    of_one, of_all = ways([once], seed=0), ways(again, seed=0)
    assert (of_all.pooled, of_all.fisher) == pytest.approx((of_one.pooled, of_one.pooled))


def test_tasks_that_share_no_documents_are_what_they_were():
    random = np.random.default_rng(8)
    tasks = [drawn(random, number, 0.1, 0.05) for number in (40, 300)]
    assert shared(apart(tasks)) == ()
    together, whole = found(apart(tasks)).moments, Moments.of(np.concatenate(tasks))
    assert (together.questions, together.mean) == (whole.questions, pytest.approx(whole.mean))
    assert together.standard_error == pytest.approx(whole.standard_error)


def test_intervals_over_tasks_that_ask_the_same_hold_the_truth_nineteen_times_of_twenty():
    random, draws, lost, gained = np.random.default_rng(9), 200, 0.15, 0.1
    held = naive = 0
    for _ in range(draws):
        tasks = alike(random, 300, lost, gained)
        moments = {task.task: Moments.of(task.values) for task in tasks}
        figure = change(together(moments, shared(tasks)))
        alone = change(Moments.of(np.concatenate([task.values for task in tasks])))
        held += figure.low <= gained - lost <= figure.high
        naive += alone.low <= gained - lost <= alone.high
    assert 0.92 < held / draws < 0.99  # two errors of 200 draws below and above the level
    assert naive / draws < 0.92


def test_under_the_null_tests_over_tasks_that_ask_the_same_reject_at_their_level(monkeypatch):
    """Eight tasks that ask the same, whose answers agree nine times of ten."""
    monkeypatch.setattr("compress.evaluation.pooled.RESAMPLES", 999)
    random, draws = np.random.default_rng(10), 100
    names, rejected = [f"document {number}" for number in range(150)], 0
    for _ in range(draws):
        first = drawn(random, 150, 0.1, 0.1)
        others = [np.where(random.random(150) < 0.9, first, drawn(random, 150, 0.1, 0.1)) for _ in range(7)]
        tasks = [Differences(f"task{n}", names, values) for n, values in enumerate([first, *others])]
        rejected += ways(tasks, seed=0).combined < 0.05
    assert rejected / draws < 0.1  # two errors of 100 draws above the level
