"""Render a comparison as one page with plots, table, bars and lineage, which fetches nothing."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple

from compress.report.columns import Column
from compress.report.compare import Comparison, Row
from compress.report.scorecard import UNITS, Figure


def to_html(comparison: Comparison) -> str:
    """The comparison as one page. Its script draws the plots and sorts; without it the table is complete."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    templates = files("compress.report") / "templates"
    script, style = ((templates / name).read_text("utf-8") for name in ("compare.js", "compare.css"))
    columns, document = comparison.full, plotted(comparison)
    return environment.get_template("compare.html").render(
        comparison=comparison,
        columns=columns,
        groups=[(group, list(of)) for group, of in groupby(columns, lambda column: column.group)],
        bars=[_bars(comparison, column) for column in comparison.brief if column.task],
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        plots=document["plots"],
        data=Markup(embedded(document)),
    )


def embedded(document: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin another."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def plotted(comparison: Comparison) -> dict[str, Any]:
    """What the script gets: models, and for every axis that can be chosen the figure of each model.

    Figures are in the unit that is shown, with their text, because only figures turn numbers into text.
    """
    axes = [column for column in comparison.full if _is_axis(comparison, column)]
    return {
        "models": [{"name": row.name, "dense": row.is_dense} for row in comparison.rows],
        "axes": [
            {
                "key": column.key,
                "group": column.group or "model",
                "label": _label(column),
                "better": column.better,
                "figures": [_figure(row.cells[column.key]) for row in comparison.rows],
            }
            for column in axes
        ],
        "plots": _plots({column.key: column for column in axes}),
    }


def _is_axis(comparison: Comparison, column: Column) -> bool:
    """Whether there is something to plot; of a task, what says which model is better."""
    cells = [row.cells[column.key] for row in comparison.rows]
    return any(isinstance(cell, Figure) for cell in cells) and bool(column.better or not column.task)


def _label(column: Column) -> str:
    title = " ".join(column.heading.split())
    return f"{column.group}: {title}" if column.section in ("harness", "audit") else title


def _figure(cell: object) -> dict[str, Any] | None:
    if not isinstance(cell, Figure):
        return None
    factor = UNITS[cell.unit].factor
    value, low, high = (None if n is None else n * factor for n in (cell.value, cell.low, cell.high))
    return {"value": value, "low": low, "high": high, "text": cell.text}


def _plots(axes: dict[str, Column]) -> list[dict[str, str]]:
    """Title and first axes of each plot: quality against size, and against speed where it was measured."""
    qualities = ("tasks_change", "perplexity", "accuracy", "exact_match", "f1", "macro_f1")
    quality = next((key for key in qualities if key in axes), None)
    speed = next((key for key in ("decode", "prefill", "latency") if key in axes), None)
    against = {"size": "size", "speed": speed}
    return [
        {"title": f"Quality against {name}", "x": x, "y": quality}
        for name, x in against.items()
        if quality and x
    ]


class Bar(NamedTuple):
    """A model's score in one task, from 0 to 1, with the ends of its interval."""

    number: int
    name: str
    text: str
    score: float | None
    low: float
    high: float


class Bars(NamedTuple):
    """All models' scores in one task. ``dense`` and ``chance`` are scores to compare with, where known."""

    task: str
    dense: float | None
    chance: float | None
    bars: list[Bar]


def _bars(comparison: Comparison, column: Column) -> Bars:
    dense = [row.cells[column.key] for row in comparison.rows if row.is_dense]
    asked = [
        task
        for row in comparison.rows
        if row.scorecard.harness_protocol
        for task in row.scorecard.harness_protocol.tasks
        if task.task == column.task
    ]
    return Bars(
        column.title,
        next((cell.value for cell in dense if isinstance(cell, Figure)), None),
        next((task.chance for task in asked if task.chance is not None), None),
        [_bar(number, row, column) for number, row in enumerate(comparison.rows, 1)],
    )


def _bar(number: int, row: Row, column: Column) -> Bar:
    cell = row.cells[column.key]
    if not isinstance(cell, Figure):
        return Bar(number, row.name, row.text(column), None, 0, 0)
    low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
    return Bar(number, row.name, row.text(column), *(min(1, max(0, end)) for end in (cell.value, low, high)))
