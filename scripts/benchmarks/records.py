"""The results of a benchmark as one JSON document, and the page that is drawn from it.

A file ``results/NAME.json`` holds everything its page shows: a title, two sentences, the commands that
measured it, notes, the layout of its tables, and one record for each row. The head is written by hand; the
benchmarks replace or add records only.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from compress.report.scorecard import MISSING, UNITS, Figure
from compress.system.files import write_atomically

FOLDER = Path(__file__).resolve().parent / "results"
MOST_COLUMNS = 8


class Document(BaseModel):
    """Base of everything in a results file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Text(Document):
    """A text that models were scored on."""

    source: str
    context: PositiveInt = Field(description="tokens in a window")
    windows: PositiveInt
    tokens: PositiveInt | None = Field(None, description="tokens scored, where known")


class Record(Document):
    """One row: what was measured, what was found, and where."""

    name: str = Field(description="unique in its file; the first cell of the row")
    steps: list[dict[str, Any]] = Field([], description="steps of the recipe, with the options given")
    calibration: dict[str, Any] | None = None
    figures: dict[str, Figure] = {}
    facts: dict[str, str] = Field({}, description="cells that are words")
    seconds: PositiveFloat | None = Field(None, description="to compress")
    peak_memory_bytes: PositiveInt | None = Field(None, description="resident, while compressing")
    machine: str
    commit: str = Field(description="of the code; of older rows, the commit whose README first showed them")
    date: datetime.date
    versions: dict[str, str] = Field({}, description="of the libraries, where known")


class Column(Document):
    """A column of a table: a figure, a fact, or ``name``, ``seconds`` or ``peak_memory``."""

    key: str
    heading: str
    decimals: int | None = Field(None, description="of figures without an interval; None: four digits")

    @property
    def is_number(self) -> bool:
        return self.key not in ("name", "loads_with", "kernel")

    def cell(self, record: Record) -> str:
        """What a reader sees of ``record`` in this column."""
        if self.key == "name":
            return record.name
        if self.key in record.facts:
            return record.facts[self.key]
        figure = record.figures.get(self.key)
        if self.key == "seconds" and record.seconds is not None:
            figure = Figure(value=record.seconds)
        if self.key == "peak_memory" and record.peak_memory_bytes is not None:
            figure = Figure(value=record.peak_memory_bytes, unit="bytes")
        return MISSING if figure is None else self.shown(figure)

    def shown(self, figure: Figure) -> str:
        """A figure with its interval; one without, with this column's decimals."""
        if figure.low is not None:
            return figure.text
        value = figure.value * UNITS[figure.unit].factor
        return f"{value:.4g}" if self.decimals is None else f"{value:,.{self.decimals}f}"


class Table(Document):
    """One table of a page."""

    title: str = ""
    columns: list[Column] = Field(max_length=MOST_COLUMNS)


class Results(Document):
    """Everything that one page shows."""

    schema_version: Literal[1] = 1
    title: str
    summary: str = Field(description="two sentences: what was compared, and what it shows")
    commands: list[str]
    texts: list[Text] = []
    notes: list[str] = []
    tables: list[Table]
    records: list[Record] = []

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.model_validate_json(file.read_text(encoding="utf-8"))

    @classmethod
    def named(cls, name: str, like: str) -> Self:
        """``results/NAME.json``; while there is none, the head of ``results/LIKE.json`` without records."""
        file = FOLDER / f"{name}.json"
        return (
            cls.read(file)
            if file.exists()
            else cls.read(FOLDER / f"{like}.json").model_copy(update={"records": []})
        )

    def put(self, record: Record) -> None:
        """Replace the record of that name, or add it at the end."""
        for index, known in enumerate(self.records):
            if known.name == record.name:
                self.records[index] = record
                return
        self.records.append(record)

    def write(self, file: Path) -> None:
        """Write atomically: a benchmark that is killed leaves a whole file."""
        document = self.model_dump(mode="json", exclude_defaults=True)
        write_atomically(
            file, compact(json.dumps({"schema_version": 1, **document}, indent=1, ensure_ascii=False))
        )


def compact(text: str) -> str:
    """JSON with every innermost object or list on one line, which is shorter and easier to compare."""
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda found: " ".join(found[0].split()), text) + "\n"


def markdown_table(table: Table, records: list[Record]) -> str:
    """A Markdown table with its title, ending with a newline, without rows that have no figure at all."""
    rows = [[column.cell(record) for column in table.columns] for record in records]
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    title = f"## {table.title}\n\n" if table.title else ""
    return title + as_markdown(
        [column.heading for column in table.columns], rows, [column.is_number for column in table.columns]
    )


def as_markdown(headings: list[str], rows: list[list[str]], numbers: list[bool] | None = None) -> str:
    """A Markdown table, numbers to the right."""
    rules = ["---:" if number else ":---" for number in numbers or [False] * len(headings)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rules, *rows))
