"""The metrics of forgetting against restatements in plain Python, and asking against one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.engine.loading import load
from compress.evaluation.forgetting import metrics
from compress.evaluation.forgetting.ask import Asked
from compress.evaluation.forgetting.intervals import paired
from compress.evaluation.forgetting.items import Question
from compress.evaluation.forgetting.known import WAYS, Known, columns, knowledge
from compress.evaluation.forgetting.recovery import gap, recovery, rise
from compress.evaluation.forgetting.utility import utility
from compress.evaluation.forgetting.words import rouge_recall


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_scores_of_one_answer(random: np.random.Generator, length: int):
    logs = -random.exponential(2.0, length)
    assert metrics.probability(logs) == pytest.approx(
        math.prod(math.exp(log) for log in logs) ** (1 / length), rel=1e-12
    )
    least = sorted(logs)[: max(1, math.floor(0.4 * length))]
    assert metrics.min_k(logs) == pytest.approx(math.fsum(least) / len(least), rel=1e-12)


@pytest.mark.parametrize("marks", ["1", "0", "111", "000", "0111", "1110", "1101", "0101101"])
def test_extraction_and_memorisation(marks: str):
    greedy = np.array([mark == "1" for mark in marks])
    n = len(marks)
    k = min(k for k in range(n + 1) if all(mark == "1" for mark in marks[k:]))
    assert metrics.extraction_strength(greedy) == pytest.approx(float(1 - Fraction(k, n)))
    assert metrics.exact_memorisation(greedy) == pytest.approx(float(Fraction(marks.count("1"), n)))


def test_truth_and_choice(random: np.random.Generator):
    right, *wrong = random.random(6).tolist()
    ratio = (sum(wrong) / 5) / right
    assert metrics.truth_ratio(right, wrong) == pytest.approx(ratio, rel=1e-12)
    assert metrics.truth(ratio) == pytest.approx(right / (right + sum(wrong) / 5), rel=1e-12)
    assert metrics.utility_of_truth(ratio) == max(0, 1 - ratio)
    assert metrics.chooses(right, wrong) == float(all(right > other for other in wrong))
    assert metrics.chooses(0.5, [0.1, 0.2]) == 1
    assert metrics.chooses(0.5, [0.6]) == 0
    assert metrics.chooses(0.5, [0.5, 0.5]) == pytest.approx(1 / 3)
    assert metrics.truth(metrics.truth_ratio(0.0, [0.0])) == 0.5  # both vanish


def test_membership_is_the_area_under_the_curve(random: np.random.Generator):
    ours, others = random.integers(0, 6, 9).astype(float), random.integers(0, 6, 5).astype(float)
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in others)
    assert metrics.membership(ours, others).mean() == pytest.approx(wins / 45, rel=1e-12)
    assert metrics.membership(ours, ours).mean() == 0.5


def test_forget_quality_counts_the_paths(random: np.random.Generator):
    """The exact p-value: the share of all orders of both samples that lie as far apart."""
    ours, others = random.random(6), random.random(7) + 0.3

    def statistic(first: set[int]) -> int:
        far = one = other = 0
        for place in range(13):
            one, other = one + (place in first), other + (place not in first)
            far = max(far, abs(one * 7 - other * 6))
        return far

    order = np.argsort(np.concatenate([ours, others]))
    seen = statistic({place for place, index in enumerate(order) if index < 6})

    def paths(one: int, other: int, known: dict[tuple[int, int], int]) -> int:
        """Ways to this pair of counts on which the two never are as far apart as was seen."""
        if abs(one * 7 - other * 6) >= seen:
            return 0
        if one == other == 0:
            return 1
        if (one, other) not in known:
            known[one, other] = sum(
                paths(*step, known) for step in ((one - 1, other), (one, other - 1)) if min(step) >= 0
            )
        return known[one, other]

    expected = 1 - paths(6, 7, {}) / math.comb(13, 6)
    assert metrics.forget_quality(ours.tolist(), others.tolist()) == pytest.approx(expected, rel=1e-9)
    assert metrics.forget_quality(ours.tolist(), ours.tolist()) == 1


def test_rouge_is_the_longest_common_subsequence():
    def longest(one: list[str], other: list[str]) -> int:
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + longest(one[1:], other[1:])
        return max(longest(one[1:], other), longest(one, other[1:]))

    for answer, said in [
        ("the cat sat on the mat", "the dog sat on a mat"),
        ("Salzburg", "He was born in Salzburg."),
        ("red blue green", "green blue red"),
        ("one", ""),
    ]:
        words = [text.lower().replace(".", "").split() for text in (answer, said)]
        assert rouge_recall(answer, said) == pytest.approx(longest(*words) / len(words[0]))


def known(random: np.random.Generator, count: int, **more: object) -> list[Known]:
    def one(number: int) -> Known:
        numbers = dict(zip((*WAYS, "min_k"), random.random(9).tolist(), strict=True))
        ratio = numbers.pop("truth") * 2
        return Known(**{"id": str(number), "truth_ratio": ratio, **numbers, **more})

    return [one(number) for number in range(count)]


def test_columns_and_what_is_known_on_the_whole(random: np.random.Generator):
    mine, others = known(random, 5), known(random, 4)
    mine.append(known(random, 1, truth_ratio=None, choice=None)[0])
    found = columns(mine, others)
    for place, one in enumerate(mine):
        ratio = one.truth_ratio
        scores = [one.probability, one.rouge, one.extraction, one.memorisation, one.choice, one.paraphrase]
        scores += [one.prefilled, None if ratio is None else 1 / (1 + ratio)]
        there = [score for score in scores if score is not None]
        assert knowledge(found)[place] == pytest.approx(sum(there) / len(there), rel=1e-12)
        beaten = sum(one.min_k > other.min_k for other in others) / 4
        assert found["membership"][place] == pytest.approx(beaten)


def test_utility_is_the_harmonic_mean_of_six_means(random: np.random.Generator):
    mine = {"retain": known(random, 7), "world": known(random, 3)}
    theirs = {"retain": known(random, 7), "world": known(random, 3)}

    def by_hand(sets: dict[str, list[Known]]) -> float:
        means = []
        for rows in sets.values():
            means.append(math.fsum(each.probability for each in rows) / len(rows))
            means.append(math.fsum(each.rouge or 0.0 for each in rows) / len(rows))
            means.append(math.fsum(max(0.0, 1 - (each.truth_ratio or 0.0)) for each in rows) / len(rows))
        return 6 / math.fsum(1 / mean for mean in means)

    found = utility(mine, theirs, seed=0)
    assert found.unlearned.value == pytest.approx(by_hand(mine), rel=1e-12)
    assert found.target.value == pytest.approx(by_hand(theirs), rel=1e-12)
    assert found.change.value == pytest.approx(by_hand(mine) / by_hand(theirs) - 1, rel=1e-9)
    assert len(found.parts) == 6


def test_recovery_and_its_paired_interval(random: np.random.Generator):
    target, never = random.uniform(0.6, 1.0, 40), random.uniform(0.0, 0.3, 40)
    unlearned = never + 0.25 * (target - never) + random.normal(0, 0.05, 40)
    full = never + random.normal(0, 0.05, 40)

    def by_hand(rows: np.ndarray, mine: np.ndarray) -> float:
        u, t, r = (math.fsum(column[rows]) / len(rows) for column in (mine, target, never))
        return (u - r) / (t - r)

    everything = np.arange(40)
    value = paired(recovery, [unlearned, target, never], seed=0)
    assert value.value == pytest.approx(by_hand(everything, unlearned), rel=1e-12)
    drawn = np.random.default_rng(99).integers(0, 40, (6000, 40))
    ends = np.percentile([by_hand(rows, unlearned) for rows in drawn], [2.5, 97.5])
    assert (value.low, value.high) == pytest.approx(ends, abs=0.006)
    # All models are drawn on the same records, or the interval would be wider.
    higher = paired(rise, [unlearned, target, never, full, target, never], seed=0)
    assert higher.value == pytest.approx(
        by_hand(everything, unlearned) - max(0, by_hand(everything, full)), rel=1e-9
    )
    rises = [by_hand(rows, unlearned) - max(0, by_hand(rows, full)) for rows in drawn]
    assert (higher.low, higher.high) == pytest.approx(np.percentile(rises, [2.5, 97.5]), abs=0.006)
    assert paired(gap, [target, never], seed=0).value == pytest.approx(
        math.fsum(target - never) / 40, rel=1e-12
    )
    assert paired(recovery, [unlearned, target, never], seed=0) == value  # the seed decides


QUESTIONS = [
    Question(tuple(b % 250 + 1 for b in prompt.encode()), tuple(b % 250 + 1 for b in answer.encode()))
    for prompt, answer in [
        ("Who?", " I"),
        ("A much longer question than the others are", " and its answer"),
        ("Where is it", " here"),
        ("Who?", " you and some others"),
        ("Him?", " no"),
        ("Him?", "?"),
        ("Him?", " yes, whoever it is"),
    ]
]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel"])
def test_asking_in_batches_is_asking_one_at_a_time(shared_decoder: Callable[..., Path], architecture: str):
    folder = shared_decoder(architecture)
    asked = Asked(load(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    given, said = asked.score(QUESTIONS), asked.say(QUESTIONS)
    for question, one, text in zip(QUESTIONS, given, said, strict=True):
        row = torch.tensor([[*question.prompt, *question.answer]])
        with torch.no_grad():
            chances = plain(row).logits[0].log_softmax(-1)
        start = len(question.prompt)
        logs = [float(chances[start - 1 + k, token]) for k, token in enumerate(question.answer)]
        best = [int(chances[start - 1 + k].argmax()) == token for k, token in enumerate(question.answer)]
        assert one.logs == pytest.approx(logs, abs=2e-4)
        assert one.greedy.tolist() == best
        assert asked.score([question])[0].logs == pytest.approx(one.logs, abs=1e-5)
        tokens = list(question.prompt)
        for _ in range(2 * len(question.answer) + 8):
            with torch.no_grad():
                token = int(plain(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == 0:
                break
            tokens.append(token)
        assert text == asked.tokenizer.decode(tokens[start:])
        assert asked.say([question]) == [text]
