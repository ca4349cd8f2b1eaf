"""A judge that says what it is told: both orders, ties, replies without a verdict, and which judge it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.errors import BadInput
from compress.evaluation.kick import judge
from compress.storage.checkpoint import Checkpoint


def likes(better: Callable[[str, str], str]) -> judge.Reply:
    """A judge that compares the two answers in a prompt."""

    def reply(prompts: Sequence[str]) -> list[str]:
        return [better(*parts(prompt)) for prompt in prompts]

    return reply


def parts(prompt: str) -> tuple[str, str]:
    first = prompt.split("[Answer of assistant A]\n")[1].split("\n\n[Answer")[0]
    return first, prompt.split("[Answer of assistant B]\n")[1].split("\n\nVerdict")[0]


def judged(reply: judge.Reply) -> judge.Judgement:
    return judge.judge(["q1", "q2", "q3"], ["good", "bad", "same"], ["bad", "good", "same"], reply, "0" * 64)


def test_a_fair_judge() -> None:
    fair = judged(likes(lambda a, b: "[[C]]" if a == b else "[[A]]" if a == "good" else "[[B]]"))
    assert fair.outcomes == ("loss", "win", "tie")
    assert fair.scores.tolist() == [0.0, 1.0, 0.5]
    assert fair.unread == 0


@pytest.mark.parametrize("always", ["[[A]]", "[[B]]", "[[C]]"])
def test_a_judge_that_looks_at_the_order_only_says_nothing(always: str) -> None:
    assert set(judged(likes(lambda a, b: always)).outcomes) == {"tie"}


def test_one_order_and_a_tie_is_a_tie() -> None:
    assert judged(likes(lambda a, b: "[[A]]" if (a, b) == ("good", "bad") else "[[C]]")).outcomes[0] == "tie"


def test_replies_without_a_verdict_are_counted_and_not_scored() -> None:
    some = judged(
        likes(lambda a, b: "I like both" if "same" in a else "[[A]] or [[B]]" if a == "good" else "[[B]]")
    )
    assert some.outcomes == ("unread", "unread", "unread")
    assert some.unread == 1
    assert len(some.scores) == 0


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
        judge.judge(["a", "b"], ["x"], ["x", "y"], likes(lambda a, b: "[[C]]"), "0" * 64)


def test_the_judge_is_the_expected_one_and_no_relative(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    sha256 = Checkpoint.open(folder).sha256
    with pytest.raises(BadInput, match="has the hash"):
        judge.local_judge(folder, "0" * 64, [])
    with pytest.raises(BadInput, match="choose a judge of another family"):
        judge.local_judge(folder, sha256, [folder])


def test_a_real_model_replies_the_same_in_any_batch(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    prompts = ["Verdict:", "A longer question. Verdict:", "Which?"]
    one, three = (
        judge.local_judge(folder, Checkpoint.open(folder).sha256, [], size)(prompts) for size in (1, 3)
    )
    assert one == three
    assert len(one) == 3
