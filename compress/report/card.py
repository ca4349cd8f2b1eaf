"""Write the model card from the lineage of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import BadInput
from compress.storage.lineage import LINEAGE, RECIPE, Lineage, read_lineage
from compress.system.files import write_atomically

CARD = "README.md"


def add_evaluations(folder: Path, evaluations: list[dict[str, Any]]) -> None:
    """Append scorecards to the lineage of a folder, and write its card again.

    Raises:
        BadInput: the folder has no compression.json.
    """
    lineage = read_lineage(folder)
    if lineage is None:
        raise BadInput(f"'{folder}' was not written by compress-model: it has no {LINEAGE}.")
    lineage.evaluations += evaluations
    write_lineage(folder, lineage)


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write compression.json, and the card (README.md) that is made from it."""
    card = render_card(lineage, (folder / RECIPE).read_text(encoding="utf-8"))
    write_atomically(folder / LINEAGE, lineage.model_dump_json(indent=2))
    write_atomically(folder / CARD, card)


def render_card(lineage: Lineage, recipe: str) -> str:
    """The model card of a lineage: Markdown with the front matter of the hub."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from compress.report.compare import newest_side_by_side
    from compress.report.render import to_markdown
    from compress.report.scorecard import Scorecard

    cards = [Scorecard.model_validate_json(json.dumps(card)) for card in lineage.evaluations]
    evaluation = to_markdown(newest_side_by_side(cards)) if cards else None
    environment = Environment(
        loader=PackageLoader("compress.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.jinja").render(
        lineage=lineage, recipe=recipe, evaluation=evaluation
    )
