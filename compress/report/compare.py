"""Lay scorecards out as one table, and decide what stands in it and what is marked.

The renderers only arrange what is decided here; they do not format numbers. Scorecards are read and chosen in
:mod:`compress.report.choose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.errors import BadInput
from compress.report.asked import differences
from compress.report.caption import caption, machines_of, notes
from compress.report.choose import (
    EVALUATE,
    Found,
    newest_of_history,
    read_scorecards,
    refuse_different_protocols,
)
from compress.report.columns import (
    AUDIT,
    COST,
    MODEL,
    QUALITY,
    VERDICT,
    Cell,
    Column,
    cells_of,
    printable,
    task_columns,
)
from compress.report.forgetting import newest_audit
from compress.report.marks import Marks, marks
from compress.report.scorecard import MISSING, Scorecard
from compress.storage.lineage import Lineage

__all__ = ["Column", "Comparison", "Row", "newest_side_by_side", "read_scorecards", "side_by_side"]

BEST = (
    "The best value of a column is marked (bold, or • where nothing can be bold), whether it is "
    "significantly better or not; the dense model does not compete."
)


@dataclass(frozen=True)
class Row:
    """One model: a cell for every column, which is None if nothing was measured; its marks; its history."""

    scorecard: Scorecard
    cells: dict[str, Cell]
    marks: dict[str, Marks]
    lineage: Lineage | None

    @property
    def name(self) -> str:
        """The name of the model, for people."""
        return printable(self.scorecard.model.name)

    @property
    def is_dense(self) -> bool:
        return self.scorecard.is_dense

    def text(self, column: Column) -> str:
        """The text of a cell in every format for people, with the marks that stand behind the number."""
        cell = self.cells[column.key]
        if cell is None:
            return MISSING
        return (printable(cell) if isinstance(cell, str) else cell.text) + self.marked(column).symbols

    def marked(self, column: Column) -> Marks:
        """The marks of a cell."""
        return self.marks.get(column.key, Marks())


@dataclass(frozen=True)
class Comparison:
    """Models that can be compared, the dense model first.

    Attributes:
        notes: sentences about single models: verdicts, warnings, and why cells are marked.
        caption: sentences that explain the numbers.
    """

    rows: list[Row]
    notes: list[str]
    caption: list[str]
    columns: tuple[Column, ...]

    @property
    def brief(self) -> tuple[Column, ...]:
        """The columns of tables for people: of every task the score only, and all scores in one group."""
        return tuple(
            column._replace(title=printable(column.task), group="score") if column.task else column
            for column in self.columns
            if column.level == "brief"
        )

    @property
    def full(self) -> tuple[Column, ...]:
        """The columns of the page: of every task a group."""
        return tuple(column for column in self.columns if column.level != "data")

    def is_number(self, column: Column) -> bool:
        """Whether no cell of the column is a word."""
        return not any(isinstance(row.cells[column.key], str) for row in self.rows)


def side_by_side(
    scorecards: Sequence[Scorecard],
    files: Sequence[str] | None = None,
    lineages: Mapping[str, Lineage] | None = None,
) -> Comparison:
    """Lay scorecards out as one table, the dense model first, the others in the order given.

    Args:
        scorecards: at least one.
        files: the files they were read from, for the error message; by default the names of the models.
        lineages: hash of a model -> how it was made, where that is known.

    Raises:
        BadInput: there is nothing to compare, or two scorecards were not made in the same way.
    """
    if not scorecards:
        raise BadInput(f"There is nothing to compare; evaluate a model first: {EVALUATE}.")
    names = files or [card.model.name for card in scorecards]
    refuse_different_protocols([Found(*each) for each in zip(scorecards, names, strict=True)])
    cards = sorted(scorecards, key=lambda card: not card.is_dense)
    dense = cards[0] if cards[0].is_dense else None
    made = [(lineages or {}).get(card.model.sha256) for card in cards]
    columns = (*MODEL, *QUALITY, *VERDICT, *task_columns(cards), *AUDIT, *COST)
    empty: dict[str, Cell] = dict.fromkeys(column.key for column in columns)
    cells = [empty | cells_of(card, dense, lineage) for card, lineage in zip(cards, made, strict=True)]
    audits = [newest_audit(lineage) if lineage else None for lineage in made]
    different = differences(cards, audits)
    marked = marks(cards, cells, columns, different, same_machine=len(machines_of(cards)) <= 1)
    rows = [Row(*each) for each in zip(cards, cells, marked, made, strict=True)]
    best = [BEST] if any(mark.best for row in rows for mark in row.marks.values()) else []
    shown = tuple(column for column in columns if _is_shown(column, rows))
    return Comparison(rows, notes(cards, different, audits), [*caption(cards, dense, audits), *best], shown)


def newest_side_by_side(scorecards: Sequence[Scorecard]) -> Comparison:
    """Compare the scorecards in one model's own history, in which evaluations of any kind follow each other.

    The newest scorecard that is not the dense model's decides how it was evaluated. Of each model the newest
    scorecard that was made in the same way is shown.
    """
    return side_by_side(newest_of_history(scorecards))


def _is_shown(column: Column, rows: list[Row]) -> bool:
    """Whether a column belongs to what was measured: where a kind of column is always shown, it shows what
    was not measured as missing; of the others those that are not empty are shown."""
    cards = [row.scorecard for row in rows]
    if column.section == "text":
        return any(card.fidelity or not (card.task or card.harness) for card in cards)
    if column.section == "speed":
        return any(card.task is None for card in cards)
    return not column.section or any(row.cells[column.key] is not None for row in rows)
