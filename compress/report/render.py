"""Render a comparison as a terminal table, Markdown, CSV or JSON. Figures format themselves.

LaTeX is in :mod:`compress.report.latex`, and the page in :mod:`compress.report.page`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from compress.errors import unknown
from compress.report.compare import Column, Comparison, Row
from compress.report.latex import to_latex
from compress.report.marks import Marks
from compress.report.page import to_html
from compress.report.scorecard import Figure

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "markdown", "latex", "csv", "json", "html")
FILE_WIDTH = 160
"""Width in characters of a table that is not printed to a terminal."""


def render(comparison: Comparison, format: str) -> str:
    """The comparison as text in one of :data:`FORMATS`, ending with a newline.

    Raises:
        BadInput: there is no such format.
    """
    if format == "table":
        from rich.console import Console

        file = io.StringIO()
        print_table(comparison, Console(file=file, width=FILE_WIDTH, color_system=None))
        return file.getvalue()
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    writers = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json, "html": to_html}
    return writers[format](comparison)


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the comparison in as many tables as the width of the console needs, then the caption."""
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    name, *others = comparison.brief

    def cell(row: Row, column: Column) -> str:
        dot = "• " if row.marked(column).best and not console.color_system else ""
        return dot + row.text(column)

    def width(column: Column) -> int:
        lines = column.heading.splitlines() + [cell(row, column) for row in comparison.rows]
        longest = max(map(cell_len, lines))
        # Names fold at a third of the width; 3 characters are padding and divider.
        return (min(longest, console.width // 3) if column == name else longest) + 3

    for columns in _fitting(name, others, width, console.width):
        table = Table(box=_rules(), show_edge=False, header_style="bold", pad_edge=True)
        for column in columns:
            is_name = column == name
            table.add_column(
                column.heading,
                justify="right" if comparison.is_number(column) else "left",
                max_width=width(column) - 3 if is_name else None,
                overflow="fold" if is_name else "ellipsis",
                no_wrap=not is_name,
            )
        for row in comparison.rows:
            table.add_row(
                *(Text(cell(row, c), "bold" if row.marked(c).best else "") for c in columns),
                style="dim" if row.is_dense else None,
            )
        console.print(table)
        console.print()
    for lines, style in ((comparison.notes, ""), (comparison.caption, "dim")):
        for line in lines:
            console.print(Padding(Text(line, style), (0, 1), expand=False))
        if lines and style != "dim":
            console.print()


def _fitting(
    name: Column, others: Sequence[Column], width: Callable[[Column], int], room: int
) -> list[list[Column]]:
    """The columns of each table: the name, and as many others as fit. A group that fits whole stays whole."""
    tables: list[list[Column]] = []
    left = 0
    for _, members in groupby(others, lambda column: column.group):
        group = list(members)
        whole = sum(map(width, group))
        if left < whole <= room - width(name):
            left = 0
        for column in group:
            if width(column) > left:
                tables.append([name])
                left = room - width(name)
            tables[-1].append(column)
            left -= width(column)
    return tables


def _rules() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def escaped(text: str) -> str:
    """A text in one line of Markdown, as it stands."""
    for special in "\\|*_`<[$~":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def to_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, with the caption as a list below."""

    def cell(row: Row, column: Column) -> str:
        text = escaped(row.text(column))
        return f"**{text}**" if row.marked(column).best else text

    columns = comparison.brief
    lines = [
        [escaped(column.heading) for column in columns],
        ["---:" if comparison.is_number(column) else ":---" for column in columns],
        *([cell(row, column) for column in columns] for row in comparison.rows),
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    below = "\n".join(f"- {escaped(line)}" for line in [*comparison.notes, *comparison.caption])
    return f"{table}\n\n{below}\n"


def to_csv(comparison: Comparison) -> str:
    """The comparison as CSV: one line per model, base units (bytes, fractions of 1), and every digit.

    A cell is empty if nothing was measured. The protocol, which other formats state in a caption, has columns
    of its own in every line.
    """
    header: list[str] = []
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        record: dict[str, Any] = {}
        for column in comparison.columns:
            cell = row.cells[column.key]
            record[column.key] = cell.cells[0] if isinstance(cell, Figure) else cell
            if _has_interval(comparison, column):
                _, low, high = cell.cells if isinstance(cell, Figure) else ("", "", "")
                record |= {f"{column.key}_low": low, f"{column.key}_high": high}
        record |= _provenance(row, any(other.scorecard.task for other in comparison.rows))
        record |= _asked(row, comparison)
        header = list(record)
        lines.append(record)
    file = io.StringIO()
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _has_interval(comparison: Comparison, column: Column) -> bool:
    cells = (row.cells[column.key] for row in comparison.rows)
    return any(isinstance(cell, Figure) and cell.low is not None for cell in cells)


def _provenance(row: Row, with_task: bool) -> dict[str, Any]:
    """How the numbers of a row were made: text, context, stride, machine, and task."""
    card, protocol, measured = row.scorecard, row.scorecard.protocol, row.scorecard.cost.measured
    asked = (
        "text",
        "text_sha256",
        "context_tokens",
        "stride_tokens",
        "windows",
        "tokens_scored",
        "compute_dtype",
    )
    timed = (
        "prefill_tokens",
        "decode_tokens",
        "threads",
        "device",
        "storage_dtype",
        "baseline_resident_bytes",
    )
    examples = ("file", "file_sha256", "examples", "inputs", "cut", "longest_tokens", "mean_tokens")
    task = card.task_protocol
    return {
        "model_sha256": card.model.sha256,
        "baseline": card.baseline.name,
        "baseline_sha256": card.baseline.sha256,
        **{name: getattr(protocol, name, None) for name in (*asked, "seed")},
        **{name: getattr(measured, name, None) for name in timed},
        **({name: getattr(task, name, None) for name in ("task", *examples)} if with_task else {}),
        "when": card.when.isoformat(),
    }


def _asked(row: Row, comparison: Comparison) -> dict[str, Any]:
    """How each task was asked, and which cells are marked."""
    protocol = row.scorecard.harness_protocol
    asked = {task.task: task for task in protocol.tasks} if protocol else {}
    tasks = dict.fromkeys(column.task for column in comparison.columns if column.task)
    if not tasks:
        return {}

    return {
        **{name: getattr(protocol, name, None) for name in ("suite", "chat_template", "lm_eval")},
        **{
            f"{task}.{name}": getattr(asked.get(task), name, None)
            for task in tasks
            for name in ("metric", "questions", "fewshot", "sha256", "chance")
        },
        "asked_differently": " ".join(
            task for task in tasks if row.marks.get(f"{task}.score", Marks()).other
        ),
    }


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON: of each row the figures (value, low, high, unit, spread), the marks, how the
    model was made, and the scorecard."""
    rows = [
        {
            "cells": {
                key: cell.model_dump(mode="json") if isinstance(cell, Figure) else cell
                for key, cell in row.cells.items()
            },
            "marks": {key: mark._asdict() for key, mark in row.marks.items()},
            "dense": row.is_dense,
            "lineage": row.lineage.model_dump(mode="json", exclude={"evaluations"}) if row.lineage else None,
            "scorecard": row.scorecard.model_dump(mode="json"),
        }
        for row in comparison.rows
    ]
    document = {"schema_version": 1, "rows": rows, "notes": comparison.notes, "caption": comparison.caption}
    return json.dumps(document, indent=2) + "\n"
