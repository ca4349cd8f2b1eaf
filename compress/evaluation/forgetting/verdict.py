"""The verdict of an audit: one sentence over all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compress.evaluation.forgetting.recovery import MOST
from compress.report.forgetting import AfterStep, Kind

MOST_LOST = 0.05
"""The largest share of its utility that a model may lose by unlearning."""


class Verdict(NamedTuple):
    """What can be said of a model on the whole."""

    kind: Kind
    sentence: str


def verdict(rows: Sequence[AfterStep]) -> Verdict:
    """One sentence over the rows, of which the first one is the model as it was unlearned.

    A model has forgotten if it has after every step of which something can be said, and the first row is one
    of them. If unlearning took more than `MOST_LOST` of its utility beyond doubt, that is with the upper end
    of the interval, it is damaged: one that knows nothing any more has forgotten everything.
    """
    failed = [row for row in rows if row.kind == "not forgotten"]
    untold = [row for row in rows if row.kind == "cannot tell"]
    if failed:
        worst = max(failed, key=_recovery)
        others = [row for row in failed if row is not worst]
        also = f"; nor has it after {_listed(others)}" if others else ""
        word = "Not forgotten" if any(map(_remembers, failed)) else "Not shown to be forgotten"
        where = f"{word} after {worst.name}" if worst is not rows[0] else word
        return Verdict("not forgotten", f"{where}, because {worst.why}{also}.")
    if rows[0].kind == "cannot tell":
        return Verdict("cannot tell", f"Nobody can tell whether it has forgotten, because {rows[0].why}.")
    change = rows[0].utility.change if rows[0].utility else None
    if change is not None and (change.value if change.high is None else change.high) < -MOST_LOST:
        return Verdict(
            "damaged",
            f"Damaged: it has forgotten, but its utility has changed by {change}, a loss of more than "
            f"{100 * MOST_LOST:.0f} %.",
        )
    passed = [row for row in rows[1:] if row.kind == "forgotten"]
    stays = f", and it stays so after {_listed(passed)}" if passed else ""
    but = f"; nothing can be said of {_listed(untold)}, where {untold[0].why}" if untold else ""
    return Verdict("forgotten", f"Forgotten{stays}{but}.")


def _recovery(row: AfterStep) -> float:
    return row.knowledge.recovery.value if row.knowledge.recovery else 0.0


def _remembers(row: AfterStep) -> bool:
    """Whether a row recovers too much beyond doubt, on the whole or by a way to ask."""
    found = [one.recovery for one in (row.knowledge, *row.scores.values()) if one.recovery]
    return any(figure.low is not None and figure.low > MOST for figure in found)


def _listed(rows: Sequence[AfterStep]) -> str:
    *others, last = [row.name for row in rows]
    return " and ".join(filter(None, [", ".join(others), last]))
