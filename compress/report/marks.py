"""Which cells of a comparison are marked: significant differences, other questions, and the best values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from compress.report.asked import Difference
from compress.report.columns import Cell, Column
from compress.report.scorecard import Figure, Scorecard

LEVEL = 0.05
"""Below this p, corrected for the number of tasks, a score differs from the dense model's."""


class Marks(NamedTuple):
    """What is marked at a cell.

    Attributes:
        star: the score differs significantly from the dense model's.
        other: the task was asked differently than of the other models, or the audit made differently.
        best: no other model but the dense one is better.
    """

    star: bool = False
    other: bool = False
    best: bool = False

    @property
    def symbols(self) -> str:
        """The marks that stand behind the number."""
        return "*" * self.star + "†" * self.other


def marks(
    cards: Sequence[Scorecard],
    cells: Sequence[Mapping[str, Cell]],
    columns: Sequence[Column],
    different: Sequence[Sequence[Difference]],
    same_machine: bool,
) -> list[dict[str, Marks]]:
    """Key of every marked cell -> its marks, for each model.

    Args:
        cards, cells, different: of each model its scorecard, its cells, and what was asked differently.
        columns: those of the cells.
        same_machine: whether speeds and memory compare.
    """
    stars = [_stars(card) for card in cards]
    others = [_others(columns, found) for found in different]
    best: list[set[str]] = [set() for _ in cards]
    for column in columns:
        if column.better and (same_machine or not column.timed):
            rivals = {
                index: cell.value * column.better
                for index, (card, row, other) in enumerate(zip(cards, cells, others, strict=True))
                if isinstance(cell := row[column.key], Figure)
                and not card.is_dense
                and column.key not in other
            }
            for index in _winners(rivals):
                best[index].add(column.key)
    return [
        {key: Marks(key in star, key in other, key in top) for key in star | other | top}
        for star, other, top in zip(stars, others, best, strict=True)
    ]


def _stars(card: Scorecard) -> set[str]:
    results = card.harness.tasks if card.harness else ()
    return {f"{result.task}.score" for result in results if result.holm_p and result.holm_p.value < LEVEL}


def _others(columns: Sequence[Column], different: Sequence[Difference]) -> set[str]:
    places = {place for difference in different for place in difference.where}
    asked = [column for column in columns if column.section in ("harness", "audit")]
    return {column.key for column in asked if (column.task or column.group) in places}


def _winners(rivals: dict[int, float]) -> list[int]:
    """The rows with the largest value; none where all are equal, or nobody competes."""
    top = max(rivals.values(), default=0.0)
    winners = [index for index, value in rivals.items() if value == top]
    return winners if len(winners) < len(rivals) else []
