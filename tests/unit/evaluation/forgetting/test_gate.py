"""The gate and the verdict on made-up scores: what passes, what fails by which clause, what is undecided."""

from __future__ import annotations

import numpy as np
import pytest

from compress.evaluation.forgetting.recovery import Outcome, Trio, gate, recovered
from compress.evaluation.forgetting.verdict import verdict
from compress.report.forgetting import AfterStep, Utility
from compress.report.scorecard import Figure

RECORDS = 60


def trio(recovery: float, noise: float = 0.02, known: float = 0.8, seed: int = 0) -> Trio:
    """Scores of records that are recovered by so much, with noise between records whose mean is 0."""
    random = np.random.default_rng(seed)
    never = random.uniform(0.1, 0.2, RECORDS)
    target = never + known
    wobble = random.normal(0, noise, RECORDS)
    return Trio(never + recovery * known + wobble - wobble.mean(), target, never)


def outcome(after: Trio, before: Trio | None = None, **singles: Trio) -> Outcome:
    ways = {name: recovered(single, 0) for name, single in singles.items()}
    return gate(recovered(after, 0, before), ways)


def test_what_stays_forgotten_passes():
    found = outcome(trio(0.02), trio(0.01), rouge=trio(0.05), choice=trio(0.0))
    assert found.kind == "forgotten"
    assert "0.02" in found.why


def test_what_is_known_again_fails():
    found = outcome(trio(0.30), trio(0.28))
    assert found.kind == "not forgotten"
    assert "0.10" in found.why


def test_the_upper_end_decides_and_not_the_estimate():
    """The recovery is below 0.10, but so few records with so much noise do not show it."""
    assert outcome(trio(0.06, noise=0.5)).kind == "not forgotten"
    assert outcome(trio(0.06, noise=0.02)).kind == "forgotten"


def test_what_rises_over_full_precision_fails():
    found = outcome(trio(0.08), trio(0.01))
    assert found.kind == "not forgotten"
    assert "rises" in found.why
    assert outcome(trio(0.08), trio(0.05)).kind == "forgotten"


def test_what_comes_up_to_a_model_that_never_learned_does_not_rise():
    assert outcome(trio(0.0), trio(-0.3)).kind == "forgotten"
    assert outcome(trio(0.08), trio(-0.3)).kind == "not forgotten"  # but it may not go beyond


def test_one_way_to_ask_that_recovers_beyond_doubt_fails():
    found = outcome(trio(0.02), trio(0.01), rouge=trio(0.0), choice=trio(0.5))
    assert found.kind == "not forgotten"
    assert "choice" in found.why
    assert "rouge" not in found.why
    assert outcome(trio(0.02), choice=trio(0.11, noise=0.5)).kind == "forgotten"  # which is in doubt


@pytest.mark.parametrize("known", [0.0, -0.3])
def test_nobody_can_tell_what_the_target_itself_does_not_know(known: float):
    after = trio(0.0, known=known)
    found = recovered(after, 0)
    assert found.recovery is None
    assert outcome(after).kind == "cannot tell"
    assert outcome(after, rouge=trio(0.9)).kind == "cannot tell"


def test_draws_that_no_ratio_exists_of_are_left_out():
    """Some draws of the records hold none of the few that the target alone knows, so all models score 0."""
    target = np.zeros(RECORDS)
    target[:4] = 1
    found = recovered(Trio(np.zeros(RECORDS), target, np.zeros(RECORDS)), 0)
    assert found.recovery == Figure(value=0, low=0, high=0)
    before = Trio(target / 2, target, np.zeros(RECORDS))
    risen = recovered(Trio(target, target, np.zeros(RECORDS)), 0, before).rise
    assert risen == Figure(value=0.5, low=0.5, high=0.5)


def test_nobody_can_tell_from_one_record():
    after = trio(0.0)
    assert outcome(Trio(*(column[:1] for column in after))).kind == "cannot tell"


def test_the_target_recovers_all_and_the_retrained_model_nothing():
    after = trio(0.5)
    whole = recovered(after._replace(unlearned=after.target), 0).recovery
    none = recovered(after._replace(unlearned=after.retrained), 0).recovery
    assert whole == Figure(value=1, low=1, high=1)
    assert none == Figure(value=0, low=0, high=0)


# --- the verdict over all rows ---


def row(name: str, recovery: float, known: float = 0.8, noise: float = 0.02) -> AfterStep:
    whole = recovered(trio(recovery, noise, known), 0)
    kind, why = gate(whole, {})
    return AfterStep(
        name=name, steps=(), knowledge=whole, scores={}, refused=Figure(value=0), kind=kind, why=why
    )


def test_the_worst_step_is_named_first():
    found = verdict([row("full precision", 0.0), row("int4", 0.3), row("int3", 0.6), row("int8", 0.0)])
    assert found.kind == "not forgotten"
    assert found.sentence.startswith("Not forgotten after int3, because its recovery is 0.60")
    assert found.sentence.endswith("nor has it after int4.")
    assert verdict([row("as it is", 0.6)]).sentence.startswith("Not forgotten, because its recovery is 0.60")
    assert verdict([row("as it is", 0.0)]).sentence == "Forgotten."


def test_what_is_in_doubt_is_not_called_remembered():
    doubtful = row("int4", 0.09, noise=0.3)
    assert doubtful.kind == "not forgotten"
    sentence = verdict([row("full precision", 0.0), doubtful]).sentence
    assert sentence.startswith("Not shown to be forgotten after int4, because its recovery is 0.09")


def test_steps_of_which_nothing_can_be_said_are_named():
    found = verdict([row("full precision", 0.0), row("int4", 0.0), row("int2", 0.0, known=0.0)])
    assert found.kind == "forgotten"
    assert found.sentence.startswith("Forgotten, and it stays so after int4; nothing can be said of int2")
    assert verdict([row("full precision", 0.0, known=0.0), row("int4", 0.0)]).kind == "cannot tell"


def use(change: Figure | None) -> Utility:
    some = Figure(value=0.5)
    return Utility(unlearned=some, target=some, change=change, parts={})


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Figure(value=-1, low=-1, high=-1, unit="fraction"), "damaged"),
        (Figure(value=-0.10, low=-0.14, high=-0.06, unit="fraction"), "damaged"),
        (Figure(value=-0.10, low=-0.17, high=-0.03, unit="fraction"), "forgotten"),  # which is in doubt
        (None, "forgotten"),
    ],
)
def test_a_model_that_is_good_for_nothing_any_more_is_damaged(change: Figure | None, kind: str):
    first = row("full precision", 0.0).model_copy(update={"utility": use(change)})
    found = verdict([first, row("int4", 0.0)])
    assert found.kind == kind
    assert ("its utility has changed by" in found.sentence) == (kind == "damaged")
    failed = first.model_copy(update={"kind": "not forgotten", "why": "it knows"})
    assert verdict([failed]).kind == "not forgotten"
