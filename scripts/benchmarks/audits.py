"""Audits on the offline benchmark of unlearning, and their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "data"))

from make_people_models import reference_model

__all__ = ["audited", "figures_of", "reference_model", "sets"]


def sets(seed: int) -> dict[str, str]:
    """The records to forget and to retain."""
    return {name: f"people:{name}:{seed}" for name in ("forget", "retain")}


def audited(folder: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """What an audit finds out about a model that was made from the target, as JSON data."""
    import compress

    return compress.audit(
        str(folder),
        target=str(reference_model("target", seed)),
        retrained=str(reference_model("retained", seed)),
        holdout=f"people:holdout:{seed}",
        world="people:world",
        seed=seed,
        **sets(seed),
        **settings,
    ).model_dump(mode="json")


def figures_of(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of an audit."""
    figures = {"after " + each["name"]: each["knowledge"]["recovery"] for each in found["rows"]}
    plain = found["rows"][0]
    figures["forget quality"] = plain["forget_quality"]
    if plain["utility"] is not None:
        figures |= {"utility": plain["utility"]["unlearned"], "utility change": plain["utility"]["change"]}
    figures |= {f"relearned in {each['steps']}": each["knowledge"]["recovery"] for each in found["relearned"]}
    return {name: figure for name, figure in figures.items() if figure is not None}
