"""Audits of forgetting beside the other figures of a comparison."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.report.forgetting import Forgetting
from compress.report.render import render
from compress.report.scorecard import Figure

from .common import WHEN, card, identity, lineage, made

NOTHING = Figure(value=0.0)


def row(name: str, recovery: float | None, own: bool = False, kind: str = "forgotten") -> dict[str, Any]:
    """A later step, after which so much comes back; ``own`` is one of the model's own recipe."""
    figure = None if recovery is None else Figure(value=recovery, low=recovery - 0.02, high=recovery + 0.02)
    use = {"unlearned": 0.61, "target": 0.64, "change": -0.047, "parts": {}}
    utility = {name: Figure(value=each) if name != "parts" else {} for name, each in use.items()}
    return {
        "name": name,
        "steps": (),
        "knowledge": dict.fromkeys(("unlearned", "target", "retrained", "gap"), NOTHING)
        | {"recovery": figure},
        "scores": {},
        "refused": NOTHING,
        "utility": {**utility, "change": Figure(value=-0.047, unit="fraction")} if own else None,
        "kind": kind,
        "why": "of something",
    }


def audit(name: str, *rows: dict[str, Any], forget: str = "0" * 64, seed: int = 0) -> Forgetting:
    return Forgetting.model_validate(
        {
            "model": identity(name),
            "target": identity("dense"),
            "retrained": identity("never"),
            "protocol": {
                "sets": {"forget": {"source": "people:forget", "sha256": forget, "records": 54}},
                "floor": "retrained model",
                "seqlen": 256,
                "seed": seed,
                "compute_dtype": "float32",
                "kernel": "reference",
            },
            "rows": rows,
            "kind": "not forgotten" if len(rows) > 1 else rows[0]["kind"],
            "sentence": f"What is said of {name}.",
            "when": WHEN,
            "versions": {},
        }
    )


def audited(folder: Path, *audits: Forgetting) -> Path:
    """A folder of the model that the audits are of."""
    history = lineage(folder.name, "npo", "rtn")
    history.audits.extend(each.model_dump(mode="json") for each in audits)
    return made(folder, history, card(folder.name))


FULL = row("full precision", 0.01, own=True)
STEPS = (row("recipe: rtn", 0.04, own=True), row("int3", 0.31, kind="not forgotten"), row("int2", None))


def test_the_audit_of_a_model_stands_beside_its_scores(tmp_path: Path):
    folder = audited(tmp_path / "small", audit("small", FULL), audit("small", FULL, *STEPS))
    found = compress.compare(str(folder))
    table = next(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert (table["recovery"], table["highest_recovery"], table["utility_change"]) == (
        "0.04",
        "0.31",
        "-0.047",
    )
    assert (table["highest_after"], table["forgotten"]) == ("int3", "not forgotten")
    for format in ("markdown", "latex", "html"):
        assert "0.310" in render(found, format)
    assert "small: What is said of small." in found.notes
    assert sum("54 records of people:forget" in line for line in found.caption) == 1


def test_without_an_audit_there_are_no_such_columns(tmp_path: Path):
    found = compress.compare(str(audited(tmp_path / "small")))
    assert not [column for column in found.columns if column.section == "audit"]
    assert "ecovery" not in " ".join(found.caption)


def test_an_untold_recovery_is_a_dash(tmp_path: Path):
    untold = row("full precision", None, own=True, kind="cannot tell")
    folders = [audited(tmp_path / name, audit(name, row)) for name, row in (("one", untold), ("two", FULL))]
    found = compress.compare(*map(str, folders))
    cells = {column.key: found.rows[0].text(column) for column in found.columns}
    assert (cells["recovery"], cells["highest_recovery"], cells["forgotten"]) == ("–", "–", "cannot tell")


@pytest.mark.parametrize(("change", "marked"), [({"forget": "1" * 64}, True), ({"seed": 1}, False)])
def test_audits_with_other_records_are_marked(change: dict[str, Any], marked: bool, tmp_path: Path):
    names = ("one", "two", "other")
    folders = [
        audited(tmp_path / name, audit(name, FULL, **(change if name == "other" else {}))) for name in names
    ]
    found = compress.compare(*map(str, folders))
    recovery = next(column for column in found.columns if column.key == "recovery")
    assert [row.marked(recovery).other for row in found.rows] == [False, False, marked]
    why = "† other, the audit: records forget 111111111111… instead of 000000000000…."
    assert (why in found.notes) == marked
