"""Gates: conditions on an evaluation that decide the exit code of ``compress-model evaluate``, for CI.

    kick:not-worse:1pt      over all tasks of a suite or group, or one task: not worse by more than 1 point
    kick_closed:matching    each of them keeps at least 95 % of the dense model's score (LLM-KICK)
    kl:below:0.05           KL divergence from the dense model in nats/token, upper end of its interval
    perplexity:ratio:1.05   perplexity divided by the dense model's, likewise

A gate asks for evidence: one that the evaluation cannot decide has failed. The dense model itself passes all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from compress.errors import BadInput, CompressError, unknown
from compress.evaluation.verdict import loss, points
from compress.report.scorecard import Harness, HarnessProtocol, Scorecard, Shared, TaskResult

GRAMMAR = "NAME:not-worse:1pt, NAME:matching, kl:below:0.05 or perplexity:ratio:1.05"
TEXT = {("kl", "below"): "KL divergence from the dense model", ("perplexity", "ratio"): "perplexity ÷ dense"}
"""Subject and rule of the gates on text -> what they look at."""

Rule = Literal["not-worse", "matching", "below", "ratio"]


class Gate(NamedTuple):
    """A condition on one model.

    Attributes:
        text: as the user wrote it.
        subject: suite, group or task, or "kl" or "perplexity".
        rule: what must hold.
        limit: a share of all questions (not-worse), nats/token (below) or a ratio; 0 for matching.
    """

    text: str
    subject: str
    rule: Rule
    limit: float = 0.0

    @property
    def of_text(self) -> bool:
        """Whether it looks at scores of text, and not at tasks."""
        return self.rule in ("below", "ratio")


class Outcome(NamedTuple):
    """Whether a gate passed, and one sentence about it."""

    passed: bool
    sentence: str


def parse_margin(text: str) -> float:
    """A margin as a share of all questions: 0.01 for ``1pt``.

    Raises:
        BadInput: it is not a number of points between 0 and 100, followed by "pt".
    """
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)pt", text.strip())
    if number is None or not 0 < float(number[1]) < 100:
        raise BadInput(f"'{text}' is not a margin; write a number of points between 0 and 100, like 1pt.")
    return float(number[1]) / 100


def parse_gate(text: str) -> Gate:
    """The gate that a text describes.

    Raises:
        BadInput: it describes none.
    """
    subject, *rest = (part.strip() for part in text.split(":"))
    match rest:
        case ["not-worse", margin] if subject:
            return Gate(text, subject, "not-worse", parse_margin(margin))
        case ["matching"] if subject:
            return Gate(text, subject, "matching")
        case ["below" | "ratio" as rule, limit] if (subject, rule) in TEXT and _positive(limit):
            return Gate(text, subject, rule, float(limit))
    raise BadInput(f"'{text}' is not a gate; write {GRAMMAR}, where NAME is a suite, a group or a task.")


def _positive(text: str) -> bool:
    return re.fullmatch(r"\d+\.?\d*|\.\d+", text) is not None and float(text) > 0


def read_gates(texts: Sequence[str], baseline: str | None, names: Iterable[str], *, text: bool) -> list[Gate]:
    """The gates that texts describe, if they can be decided.

    Args:
        texts: what the user wrote.
        baseline: the dense model, which they compare with.
        names, text: as in `refuse_impossible`.

    Raises:
        BadInput: a text describes no gate, or one that cannot be decided.
    """
    gates = [parse_gate(each) for each in texts]
    if gates and baseline is None:
        raise BadInput("A gate compares a model with the dense one; name that with --baseline.")
    refuse_impossible(gates, names, text=text)
    return gates


def refuse_impossible(gates: Sequence[Gate], names: Iterable[str], *, text: bool) -> None:
    """Refuse gates that look at something that will not be measured.

    Args:
        names: suite, groups and tasks that will be asked; empty if none will.
        text: whether text will be scored.

    Raises:
        BadInput: a gate is on a task that is not asked, or on text that is not scored.
    """
    known = sorted(names)
    for gate in gates:
        if gate.of_text and not text:
            raise BadInput(f"The gate '{gate.text}' is on text, but no text is scored; leave the gate out.")
        if not gate.of_text and not known:
            raise BadInput(
                f"The gate '{gate.text}' is on tasks, but none is asked; name some with --suite or --tasks."
            )
        if not gate.of_text and not any(_may_cover(gate.subject, name) for name in known):
            raise unknown("suite or task for a gate", gate.subject, known)


def _covers(subject: str, name: str) -> bool:
    """Whether a name is the subject of a gate, or belongs to the group of that name."""
    return name == subject or name.startswith(f"{subject}_")


def _may_cover(subject: str, name: str) -> bool:
    """Whether a gate may be on something that is asked: what groups and files hold shows only later."""
    return _covers(subject, name) or _covers(name, subject) or name.endswith((".yaml", ".yml"))


def check(gate: Gate, card: Scorecard) -> Outcome:
    """Hold a scorecard against a gate.

    Raises:
        BadInput: the scorecard has not what the gate looks at.
    """
    if card.is_dense:
        return Outcome(True, f"Gate {gate.text} passed: {card.model.name} is the dense model itself.")
    passed, found = _on_text(gate, card) if gate.of_text else _on_tasks(gate, card)
    return Outcome(passed, f"Gate {gate.text} {'passed' if passed else 'failed'}: {found}.")


def enforce(gates: Sequence[Gate], card: Scorecard) -> list[str]:
    """The sentences about gates that all passed.

    Raises:
        CompressError: one failed; the message has the sentences of all that did.
    """
    outcomes = [check(gate, card) for gate in gates]
    if failed := [outcome.sentence for outcome in outcomes if not outcome.passed]:
        raise CompressError(" ".join(failed))
    return [outcome.sentence for outcome in outcomes]


def _on_text(gate: Gate, card: Scorecard) -> tuple[bool, str]:
    if card.fidelity is None:
        raise BadInput(f"The gate '{gate.text}' is on text, but no text was scored.")
    figure = card.fidelity.kl_mean if gate.subject == "kl" else card.fidelity.perplexity_ratio
    highest = math.inf if figure.high is None else figure.high  # a single window tells nothing of others
    passed, limit = highest < gate.limit, f"{gate.limit:.6g}"
    compared = f"below {limit}" if passed else f"not below {limit} beyond doubt"
    return passed, f"the {TEXT[gate.subject, gate.rule]} is {figure}, {compared}"


def _on_tasks(gate: Gate, card: Scorecard) -> tuple[bool, str]:
    if card.harness is None or card.harness_protocol is None:
        raise BadInput(f"The gate '{gate.text}' is on tasks, but none was asked.")
    results, questions = _chosen(gate, card.harness, card.harness_protocol)
    if gate.rule == "matching":
        return _matching(results)
    return _not_worse(results, questions, card.harness.shared, gate.limit)


def _chosen(gate: Gate, harness: Harness, protocol: HarnessProtocol) -> tuple[list[TaskResult], list[int]]:
    """The results that a gate looks at, and their numbers of questions."""
    questions = {asked.task: asked.questions for asked in protocol.tasks}
    if gate.subject == protocol.suite:
        chosen = list(harness.tasks)
    else:  # a task before those whose names begin alike: kick_choice before kick_choice_words
        chosen = [each for each in harness.tasks if each.task == gate.subject] or [
            each for each in harness.tasks if _covers(gate.subject, each.task)
        ]
    if not chosen:
        raise unknown("suite or task for a gate", gate.subject, questions)
    return chosen, [questions[each.task] for each in chosen]


def _matching(results: Sequence[TaskResult]) -> tuple[bool, str]:
    failed = [f"{each.task} ({each.score.text} %)" for each in results if not each.matching]
    if failed:
        return False, f"less than 95 % of the dense model's score is left on {', '.join(failed)}"
    return True, f"at least 95 % of the dense model's score is left on {', '.join(e.task for e in results)}"


def _not_worse(
    results: Sequence[TaskResult], questions: Sequence[int], shared: Sequence[Shared], margin: float
) -> tuple[bool, str]:
    found = loss(results, questions, shared, margin)
    if found.within or found.broken:
        return found.within, found.text
    return False, f"{found.text}, so a loss of more than {points(margin)} is not ruled out"
