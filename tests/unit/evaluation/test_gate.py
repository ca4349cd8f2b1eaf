from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from compress.errors import BadInput, CompressError
from compress.evaluation.gate import check, enforce, parse_gate, parse_margin, refuse_impossible
from compress.evaluation.pairs import judge
from compress.report.scorecard import Fidelity, Figure, Protocol, Scorecard

from .common import answers, flips, scorecards

FINE, WORSE, VAGUE = flips(2000, 30, 31), flips(2000, 150, 60), flips(200, 10, 10)


def small(**tasks: tuple[list[int], list[int]]) -> Scorecard:
    return scorecards(tasks)[1]


def on_text(kl: float, ratio: float, reach: float) -> Scorecard:
    exact = Figure(value=1)
    fidelity = Fidelity(
        perplexity=exact,
        perplexity_ratio=Figure(value=ratio, low=ratio - reach, high=ratio + reach),
        kl_mean=Figure(value=kl, low=kl - reach, high=kl + reach, unit="nats/token"),
        kl_standard_error=reach / 2,
        kl_median=exact,
        kl_p99=exact,
        kl_max=exact,
        top1_agreement=exact,
        rms_delta_p=exact,
    )
    protocol = Protocol(
        text="text",
        text_sha256="c" * 64,
        context_tokens=512,
        stride_tokens=512,
        windows=1,
        tokens_scored=511,
        compute_dtype="float32",
        seed=0,
        kernel="torch",
    )
    return small(kick_factoid=FINE).model_copy(update={"fidelity": fidelity, "protocol": protocol})


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("kick:not-worse:1pt", ("kick", "not-worse", 0.01)),
        ("mmlu_anatomy:not-worse:0.5pt", ("mmlu_anatomy", "not-worse", 0.005)),
        ("kick_closed:matching", ("kick_closed", "matching", 0.0)),
        ("kl:below:0.05", ("kl", "below", 0.05)),
        ("perplexity:ratio:1.05", ("perplexity", "ratio", 1.05)),
        (" kick : not-worse : 2.5pt ", ("kick", "not-worse", 0.025)),
    ],
)
def test_gates_are_read(text: str, fields: tuple):
    gate = parse_gate(text)
    assert gate.text == text
    assert (gate.subject, gate.rule, pytest.approx(gate.limit)) == fields


@pytest.mark.parametrize(
    "text",
    [
        *("", "kick", "kick:", ":matching", "kick:worse", "kick:not-worse", "kick:matching:5", "kl:below:"),
        *(
            "kl:below:x",
            "kl:below:0",
            "kl:below:-1",
            "kl:ratio:1.05",
            "perplexity:below:20",
            "kick:below:0.05",
        ),
        *("kl:below:nan", "kl:below:0.05:more", "kl:below:1e3"),
    ],
)
def test_what_is_no_gate_is_refused_in_one_sentence(text: str):
    with pytest.raises(
        BadInput, match=r"is not a gate; write NAME:not-worse:1pt, NAME:matching, kl:below:0\.05"
    ):
        parse_gate(text)


@pytest.mark.parametrize("margin", ["", "1", "1%", "pt", "-1pt", "0pt", "100pt", "nanpt", "1 pt", "1e1pt"])
def test_what_is_no_margin_is_refused(margin: str):
    for read in (parse_margin, lambda text: parse_gate(f"kick:not-worse:{text}")):
        with pytest.raises(
            BadInput, match="not a margin; write a number of points between 0 and 100, like 1pt"
        ):
            read(margin)


def test_a_gate_on_a_suite_a_group_and_a_task():
    card = small(kick_factoid=FINE, kick_closed=WORSE, mmlu_anatomy=FINE, mmlu_law=FINE)
    passed = {
        name: check(parse_gate(f"{name}:not-worse:1pt"), card).passed
        for name in ("kick", "kick_factoid", "kick_closed", "mmlu", "mmlu_law")
    }
    assert passed == {
        "kick": False,
        "kick_factoid": True,
        "kick_closed": False,
        "mmlu": True,
        "mmlu_law": True,
    }


def test_a_gate_on_a_task_leaves_out_those_whose_names_begin_alike():
    card = small(kick_choice=WORSE, kick_choice_words=FINE)
    found = check(parse_gate("kick_choice:not-worse:1pt"), card)
    assert not found.passed
    assert found == check(parse_gate("kick_choice:not-worse:1pt"), small(kick_choice=WORSE))
    assert check(parse_gate("kick_choice_words:not-worse:1pt"), card).passed


def test_the_suite_is_all_of_its_tasks_whatever_they_are_called():
    worse, fine = small(kick_closed=WORSE, arc=FINE), small(kick_closed=FINE, arc=WORSE)
    assert not check(parse_gate("kick:not-worse:1pt"), worse).passed
    assert not check(parse_gate("kick:not-worse:1pt"), fine).passed
    without = fine.model_copy(
        update={"harness_protocol": fine.harness_protocol.model_copy(update={"suite": None})}
    )
    assert check(parse_gate("kick:not-worse:1pt"), without).passed  # the tasks that begin so


def test_a_gate_counts_questions_that_ask_the_same_once():
    """Two tasks that lose no answer prove more than one, but not if the second asks for the same facts."""
    same, names = flips(200, 0, 0)[0], tuple(f"fact {number}" for number in range(200))
    gate = parse_gate("kick:not-worse:1pt")
    for documents, passed in (
        ((names, tuple(f"other {name}" for name in names)), True),
        ((names, names), False),
    ):
        both = [answers(same, f"kick_{n}", documents=each) for n, each in enumerate(documents)]
        card = small(kick_0=(same, same), kick_1=(same, same))
        judged = judge(both, both, margin=0.01, seed=0)
        assert check(gate, card.model_copy(update={"harness": judged})).passed is passed


def test_each_gate_has_its_own_margin():
    card = small(kick_factoid=WORSE)  # loses 4.5 points
    passed = [check(parse_gate(f"kick:not-worse:{points}pt"), card).passed for points in (1, 5, 8)]
    assert passed == [False, False, True]
    assert check(parse_gate("kick:not-worse:8pt"), card).sentence == (
        "Gate kick:not-worse:8pt passed: its score changes by −4.5 ± 1.4 points on 2,000 questions."
    )


def test_what_is_undecided_fails():
    outcome = check(parse_gate("kick:not-worse:1pt"), small(kick_factoid=VAGUE))
    assert outcome == (
        False,
        "Gate kick:not-worse:1pt failed: its score changes by 0.0 ± 4.7 points on 200 questions, so a loss "
        "of more than 1 point is not ruled out.",
    )


def test_matching():
    card = small(kick_factoid=FINE, kick_closed=WORSE)
    assert check(parse_gate("kick_factoid:matching"), card).passed
    outcome = check(parse_gate("kick:matching"), card)
    assert not outcome.passed
    assert "less than 95 % of the dense model's score is left on kick_closed (" in outcome.sentence


@pytest.mark.parametrize(
    ("kl", "reach", "passed"), [(0.03, 0.01, True), (0.045, 0.01, False), (0.2, 0.01, False)]
)
def test_text_must_be_below_the_limit_with_its_interval(kl: float, reach: float, passed: bool):
    card = on_text(kl, 1 + kl, reach)
    assert check(parse_gate("kl:below:0.05"), card).passed is passed
    assert check(parse_gate("perplexity:ratio:1.05"), card).passed is passed


def test_the_dense_model_passes():
    dense = scorecards({"kick_factoid": WORSE})[0]
    assert enforce([parse_gate("kick:not-worse:1pt"), parse_gate("kl:below:0.05")], dense)


def test_one_failed_gate_fails_and_says_which():
    card = small(kick_factoid=FINE, kick_closed=WORSE)
    gates = [parse_gate(text) for text in ("kick_factoid:not-worse:1pt", "kick_closed:not-worse:1pt")]
    assert enforce(gates[:1], card) == [check(gates[0], card).sentence]
    with pytest.raises(CompressError) as caught:
        enforce(gates, card)
    assert caught.value.exit_code == 1
    assert str(caught.value) == check(gates[1], card).sentence


def test_gates_on_what_is_not_measured_are_refused_before_the_work():
    on_tasks, on_text = parse_gate("kik:not-worse:1pt"), parse_gate("kl:below:0.05")
    with pytest.raises(BadInput, match="no suite or task for a gate 'kik'; did you mean 'kick'"):
        refuse_impossible([on_tasks], ["kick", "kick_closed"], text=True)
    with pytest.raises(BadInput, match="none is asked; name some with --suite or --tasks"):
        refuse_impossible([on_tasks], [], text=True)
    with pytest.raises(BadInput, match="no text is scored"):
        refuse_impossible([on_text], ["kick"], text=False)
    refuse_impossible([parse_gate("mmlu_anatomy:matching"), on_text], ["mmlu"], text=True)
    refuse_impossible([parse_gate("mine:matching")], ["tasks/mine.yaml"], text=True)


def test_gates_on_what_was_not_measured_are_refused_after_it():
    card = small(kick_factoid=FINE)
    with pytest.raises(BadInput, match="no text was scored"):
        check(parse_gate("kl:below:0.05"), card)
    with pytest.raises(BadInput, match="no suite or task for a gate 'arc'"):
        check(parse_gate("arc:matching"), card)


def test_the_gates_and_the_job_of_the_how_to():
    text = (Path(__file__).resolve().parents[3] / "docs" / "how-to" / "gate-in-ci.md").read_text(
        encoding="utf-8"
    )
    gates = re.findall(r"--gate (\S+:\S+)", text) + re.findall(r"^\| `(\S+:\S+)`", text, flags=re.M)
    assert len([parse_gate(each) for each in gates]) >= 8
    job = yaml.safe_load(re.search(r"```yml\n(.*?)```", text, flags=re.S)[1])["jobs"]["quality"]
    assert any("compress-model evaluate small" in step.get("run", "") for step in job["steps"])
