"""A judge that says what it is told: both orders, ties, replies without a verdict, and which judge it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from compress.errors import BadInput
from compress.evaluation.kick import judge
from compress.storage.checkpoint import Checkpoint


@dataclass
class Likes:
    """A judge that compares the two answers in a prompt."""

    better: Callable[[str, str], str]
    sha256: str = "0" * 64

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        return [self.better(*parts(prompt)) for prompt in prompts]


def parts(prompt: str) -> tuple[str, str]:
    first = prompt.split("[Answer of assistant A]\n")[1].split("\n\n[Answer")[0]
    return first, prompt.split("[Answer of assistant B]\n")[1].split("\n\nVerdict")[0]


THREE = (["q1", "q2", "q3"], ["good", "bad", "same"], ["bad", "good", "same"])


def test_a_fair_judge() -> None:
    fair = Likes(lambda a, b: "[[C]]" if a == b else "[[A]]" if a == "good" else "[[B]]")
    assert judge.outcomes(*THREE, fair) == ["loss", "win", "tie"]
    found = judge.compared(*THREE, fair, seed=0)
    assert (found.judge, found.wins, found.losses, found.ties, found.unread) == ("0" * 64, 1, 1, 1, 0)
    assert found.score is not None
    assert (found.score.value, found.p.value) == (0.5, 1.0)


def test_a_clear_preference_is_significant() -> None:
    better = Likes(lambda a, b: "[[A]]" if a == "good" else "[[B]]")
    found = judge.compared(["q"] * 8, ["bad"] * 8, ["good"] * 8, better, seed=0)
    assert found.score is not None
    assert found.score.value == 1
    assert found.p.value == pytest.approx(2 * 0.5**8)


@pytest.mark.parametrize("always", ["[[A]]", "[[B]]", "[[C]]"])
def test_a_judge_that_looks_at_the_order_only_says_nothing(always: str) -> None:
    assert set(judge.outcomes(*THREE, Likes(lambda a, b: always))) == {"tie"}


def test_one_order_and_a_tie_is_a_tie() -> None:
    half = Likes(lambda a, b: "[[A]]" if (a, b) == ("good", "bad") else "[[C]]")
    assert judge.outcomes(*THREE, half)[0] == "tie"


def test_replies_without_a_verdict_are_counted_and_not_scored() -> None:
    unclear = Likes(
        lambda a, b: "I like both" if "same" in a else "[[A]] or [[B]]" if a == "good" else "[[B]]"
    )
    found = judge.compared(*THREE, unclear, seed=0)
    assert (found.unread, found.score, found.p.value) == (3, None, 1.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[[A]]", "A"),
        ("It is [[B]].", "B"),
        ("[[C]] [[C]]", "C"),
        ("A", None),
        ("[[A]] [[B]]", None),
        ("", None),
    ],
)
def test_verdicts(said: str, expected: str | None) -> None:
    assert judge.verdict(said) == expected


def test_numbers_that_differ_are_refused() -> None:
    with pytest.raises(BadInput, match="2 questions with 1 and 2 answers cannot be judged"):
        judge.outcomes(["a", "b"], ["x"], ["x", "y"], Likes(lambda a, b: "[[C]]"))


def test_the_judge_is_no_relative(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    with pytest.raises(BadInput, match="choose a judge of another family"):
        judge.LocalJudge(folder, [folder])


def test_a_real_model_replies_the_same_in_any_batch(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    prompts = ["Verdict:", "A longer question. Verdict:", "Which?"]
    shares: list[float] = []
    one, three = (judge.LocalJudge(folder, [], "cpu", shares.append, size)(prompts) for size in (1, 3))
    assert one == three
    assert len(one) == 3
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1, 0, 1])
    assert judge.LocalJudge(folder, []).sha256 == Checkpoint.open(folder).sha256


def test_a_judge_that_cannot_read_so_much_says_so(tiny_decoder: Callable[..., Path]) -> None:
    short = judge.LocalJudge(tiny_decoder("GPT2LMHeadModel", n_positions=64), [])
    with pytest.raises(BadInput, match=r"takes only 64 tokens, and a prompt with its reply has \d+"):
        judge.compared(*THREE, short, seed=0)
