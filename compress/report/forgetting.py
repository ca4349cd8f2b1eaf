"""The result of an audit: what a model that was made to forget still knows, and after which step.

``compression.json`` keeps a list of them, ``compress-model audit --json`` prints one, and the model card
shows the newest. As on scorecards, every number is a :class:`~compress.report.scorecard.Figure`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, Field, NonNegativeInt, PositiveInt

from compress.report.scorecard import MISSING, Document, Figure, ModelIdentity, Sha256

if TYPE_CHECKING:
    from rich.console import Console

    from compress.storage.lineage import Lineage

Kind = Literal["forgotten", "not forgotten", "damaged", "cannot tell"]
Floor = Literal["retrained model", "wrong answers"]

HEADINGS = (
    "step",
    "unlearned",
    "target",
    "never learned",
    "recovery",
    "codes that differ",
    "utility",
    "verdict",
)


class Recovered(Document):
    """One score of the three models, and how much of what the target knows the unlearned model knows.

    ``retrained`` is the score of the model that never learned the forget set, or of chance.
    """

    unlearned: Figure
    target: Figure
    retrained: Figure | None
    gap: Figure | None = Field(description="S(target) - S(retrained): what there is to forget")
    recovery: Figure | None = Field(
        None, description="(S(unlearned) - S(retrained)) / gap; None where the gap may be 0"
    )
    rise: Figure | None = Field(
        None, description="the recovery minus that in full precision, or minus 0 if that is below"
    )


class Codes(Document):
    """How many low-bit codes of the quantized target and the quantized unlearned model differ."""

    weights: PositiveInt
    differ: NonNegativeInt

    @property
    def share(self) -> Figure:
        return Figure(value=self.differ / self.weights, unit="fraction")


class Utility(Document):
    """What the model is good for beside the forget set: the harmonic mean of probability, ROUGE-L and truth
    over the retained records and, where there are some, those about the world."""

    unlearned: Figure
    target: Figure
    change: Figure | None = Field(
        description="the unlearned model's divided by the target's, minus 1; None if the target has none"
    )
    parts: dict[str, Figure] = Field(description="the unlearned model's means, such as 'retain probability'")


class AfterStep(Document):
    """What is left of forgetting after a later step, done to all models."""

    name: str
    steps: tuple[dict[str, Any], ...] = Field(description="methods with the options given; empty for none")
    knowledge: Recovered = Field(description="the mean of all ways to ask for a record")
    scores: dict[str, Recovered] = Field(description="each way to ask, by name")
    forget_quality: Figure | None = Field(
        None, description="p-value that truth ratios are distributed as the retrained model's"
    )
    truth_ratio: Figure | None = Field(None, description="mean of min(R, 1/R) of the unlearned model")
    refused: Figure | None = Field(
        None, description="share of the forget set's questions that are refused; None if it asks nothing"
    )
    utility: Utility | None = Field(
        None, description="only in full precision and after steps of the model's own recipe"
    )
    codes: Codes | None = Field(None, description="None where nothing is packed, or where it is not alike")
    kind: Kind
    why: str


class Relearned(Document):
    """What is known after so many updates of LoRA on the retained records."""

    steps: NonNegativeInt
    knowledge: Recovered


class RecordsUsed(Document):
    """One set of records."""

    source: str
    sha256: Sha256
    records: PositiveInt = Field(description="number of records that were asked for")


class ForgettingProtocol(Document):
    """How the models were asked. Audits can be compared only if these agree."""

    sets: dict[str, RecordsUsed] = Field(description="forget, retain, holdout, world")
    floor: Floor | None = Field(description="what stands for a model that never learned")
    seqlen: PositiveInt
    seed: int
    compute_dtype: str | None
    kernel: str


class Forgetting(Document):
    """One audit of one model."""

    schema_version: Literal[1] = 1
    model: ModelIdentity
    target: ModelIdentity
    retrained: ModelIdentity | None
    protocol: ForgettingProtocol
    rows: tuple[AfterStep, ...] = Field(min_length=1)
    relearned: tuple[Relearned, ...] = ()
    kind: Kind
    sentence: str
    notes: tuple[str, ...] = ()
    when: AwareDatetime
    versions: dict[str, str]

    @property
    def own(self) -> AfterStep:
        """The row of the model as it is, after the steps of its own recipe."""
        return [row for row in self.rows if row.utility or row is self.rows[0]][-1]

    @property
    def highest(self) -> AfterStep | None:
        """The row in which most comes back; None if nothing can be said of any."""
        told = [row for row in self.rows if row.knowledge.recovery]
        return max(told, key=_recovered, default=None)

    def cells(self) -> list[list[str]]:
        """The table for people, under `HEADINGS`."""
        return [_cells(row) for row in self.rows]

    def ways(self) -> tuple[list[str], list[list[str]]]:
        """A table of the recovery by each way to ask: its headings, and a row for each step."""
        names = list(self.rows[0].scores)
        rows = [[row.name, *(_text(row.scores[name].recovery) for name in names)] for row in self.rows]
        return ["recovery by", *names], rows

    def curve(self) -> tuple[list[str], list[list[str]]]:
        """A table of what is known after relearning: its headings, and a row for each number of steps."""
        rows = [
            [str(point.steps), *(_text(f) for f in (k.unlearned, k.target, k.retrained, k.recovery))]
            for point in self.relearned
            for k in (point.knowledge,)
        ]
        return ["relearning steps", *HEADINGS[1:5]], rows


def newest_audit(lineage: Lineage) -> Forgetting | None:
    """The newest audit of a model; None if there is none."""
    return Forgetting.model_validate_json(json.dumps(lineage.audits[-1])) if lineage.audits else None


def _recovered(row: AfterStep) -> float:
    return row.knowledge.recovery.value if row.knowledge.recovery else 0.0


def _cells(row: AfterStep) -> list[str]:
    known = row.knowledge
    models = (known.unlearned, known.target, known.retrained)
    return [
        row.name,
        *(_text(figure) for figure in models),
        _text(known.recovery),
        str(row.codes.share) if row.codes else MISSING,
        _text(row.utility.unlearned) if row.utility else MISSING,
        row.kind,
    ]


def _text(figure: Figure | None) -> str:
    return MISSING if figure is None else figure.text


def print_audit(audit: Forgetting, console: Console) -> None:
    """Print what is left after each step, by which way to ask, the relearning curve, and the verdict."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for headings, rows in _tables(audit):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=True)
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place > 0 else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for line in (audit.sentence, *audit.notes):
        console.print(Padding(Text(line), (0, 1), expand=False), soft_wrap=True)


def _tables(audit: Forgetting) -> list[tuple[list[str], list[list[str]]]]:
    tables = ((list(HEADINGS), audit.cells()), audit.ways(), audit.curve())
    return [table for table in tables if table[1] and len(table[0]) > 1]


def to_markdown(audit: Forgetting) -> str:
    """The tables of an audit for a model card."""
    return "\n".join(_markdown(headings, rows) for headings, rows in _tables(audit))


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
