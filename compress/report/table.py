"""Evaluated models in one table, as users ask for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compress.report.choose import Found, newest_of_each_model, read_lineages, read_scorecards, same_weights
from compress.report.compare import Comparison, side_by_side
from compress.report.render import render
from compress.report.scorecard import Scorecard
from compress.storage.lineage import Lineage


@dataclass(frozen=True)
class Table(Comparison):
    """A comparison that can be printed."""

    def __str__(self) -> str:
        return render(self, "table")

    def render(self, format: str) -> str:
        """The table as text: "table", "markdown", "latex", "csv", "json" or "html".

        Raises:
            BadInput: there is no such format.
        """
        return render(self, format)


def compare(*models: str | Path | Scorecard | Iterable[Scorecard]) -> Table:
    """Put evaluated models into one table, the dense model first, the others in the order given.

    Each model is represented by its newest evaluation that was made in the same way as the others'. Models
    with the same weights share a row, and a note says so.

    Args:
        models: folders or .gguf files with evaluations in their records, files that
            ``compress-model evaluate --json`` wrote, or scorecards, one by one or several together.

    Returns:
        The table: ``print`` shows it, and its ``render`` knows more formats.

    Raises:
        BadInput: there is nothing to compare, a path has no evaluation, or two models were not evaluated in
            the same way.
    """
    found: list[Found] = []
    lineages: dict[str, Lineage] = {}
    for model in models:
        if isinstance(model, str | Path):
            found += [Found(card, str(model)) for card in read_scorecards(model)]
            lineages |= read_lineages(model)
        else:
            cards = [model] if isinstance(model, Scorecard) else model
            found += [Found(card, card.model.name) for card in cards]
    chosen = newest_of_each_model(found)
    table = side_by_side([card for card, _ in chosen], [file for _, file in chosen], lineages)
    notes = [*same_weights(found, chosen), *table.notes]
    return Table(table.rows, notes, table.caption, table.columns)
