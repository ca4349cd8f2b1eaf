"""Read scorecards, refuse those that cannot be compared, and lay the others out as one table.

The renderers in :mod:`compress.report.render` only arrange what is decided here; they do not format numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from compress.errors import BadInput
from compress.report.scorecard import MISSING, UNITS, Figure, Scorecard

EVALUATE = "compress-model evaluate MODEL --baseline DENSE --json FILE"

Cell = Figure | str | None


class Column(NamedTuple):
    """A column of the comparison.

    Attributes:
        key: its name in CSV and JSON.
        title: its title in tables.
        unit: the unit of its figures, a key of `UNITS`.
        section: what models must have been scored or measured on for the column to be shown; "" shows it
            always.
    """

    key: str
    title: str
    unit: str = ""
    section: Literal["", "text", "task", "device"] = ""

    @property
    def heading(self) -> str:
        """Title and unit on two lines."""
        shown = UNITS[self.unit].heading
        return f"{self.title}\n({shown})" if shown else self.title


COLUMNS = (
    Column("model", "model"),
    Column("size", "size", "bytes"),
    Column("size_ratio", "size ÷\ndense"),
    Column("bits_per_parameter", "bits per\nparameter"),
    Column("parameters", "parameters", "parameters"),
    Column("perplexity", "perplexity", section="text"),
    Column("perplexity_ratio", "perplexity\n÷ dense", section="text"),
    Column("kl_mean", "KL from dense", "nats/token", section="text"),
    Column("top1_agreement", "top-1\nagreement", "fraction", section="text"),
    Column("accuracy", "accuracy", "fraction", section="task"),
    Column("exact_match", "exact match", "fraction", section="task"),
    Column("f1", "F1", "fraction", section="task"),
    Column("macro_f1", "macro F1", "fraction", section="task"),
    Column("agreement", "agreement\nwith dense", "fraction", section="task"),
    Column("mcnemar_p", "McNemar's p\nagainst dense", section="task"),
    Column("flops", "FLOPs", "flops", section="task"),
    Column("flops_ratio", "FLOPs ÷\ndense", section="task"),
    Column("latency", "latency", "seconds", section="task"),
    Column("peak_memory", "peak memory", "bytes"),
    Column("added_memory", "memory added\nby the model", "bytes"),
    Column("peak_device_memory", "peak memory\nof the device", "bytes", section="device"),
    Column("prefill", "prefill", "tokens/s", section="text"),
    Column("decode", "decode", "tokens/s", section="text"),
    Column("kernel", "kernel"),
    Column("loads_with", "loads with"),
)


@dataclass(frozen=True)
class Row:
    """One model: a cell for every column, which is None if nothing was measured."""

    scorecard: Scorecard
    cells: dict[str, Cell]

    @property
    def is_dense(self) -> bool:
        return self.scorecard.is_dense

    def text(self, column: Column) -> str:
        """The text of a cell in every format for people."""
        cell = self.cells[column.key]
        if cell is None:
            return MISSING
        return cell if isinstance(cell, str) else cell.text


@dataclass(frozen=True)
class Comparison:
    """Models that can be compared, the dense model first, and the caption that explains the numbers."""

    rows: list[Row]
    caption: list[str]
    columns: tuple[Column, ...] = COLUMNS


def side_by_side(scorecards: Sequence[Scorecard], files: Sequence[str] | None = None) -> Comparison:
    """Lay scorecards out as one table, the dense model first, the others in the order given.

    Args:
        scorecards: at least one.
        files: the files they were read from, for the error message; by default the names of the models.

    Raises:
        BadInput: there is nothing to compare, or two scorecards were not made in the same way.
    """
    if not scorecards:
        raise BadInput(f"There is nothing to compare; evaluate a model first: {EVALUATE}.")
    _refuse_different_protocols(scorecards, files or [card.model.name for card in scorecards])
    ordered = sorted(scorecards, key=lambda card: not card.is_dense)
    dense = ordered[0] if ordered[0].is_dense else None
    rows = [Row(card, _cells(card, dense)) for card in ordered]
    return Comparison(rows, _caption([row.scorecard for row in rows], dense), _columns(rows))


def _columns(rows: list[Row]) -> tuple[Column, ...]:
    """The columns to show: those of text, unless all rows are of tasks; of tasks and devices those that are
    not empty."""
    scored_on_text = any(row.scorecard.task is None for row in rows)

    def shown(column: Column) -> bool:
        if column.section in ("task", "device"):
            return any(row.cells[column.key] is not None for row in rows)
        return scored_on_text or column.section != "text"

    return tuple(column for column in COLUMNS if shown(column))


def newest_side_by_side(scorecards: Sequence[Scorecard]) -> Comparison:
    """Compare the scorecards in one model's own history, in which evaluations of any kind follow each other.

    The newest scorecard that is not the dense model's decides how it was evaluated. Of each model the newest
    scorecard that was made in the same way is shown.
    """
    newest = max(scorecards, key=lambda card: (not card.is_dense, card.when))
    wanted = protocol_fields(newest)
    alike = [card for card in scorecards if protocol_fields(card) == wanted]
    by_model = {card.model.sha256: card for card in sorted(alike, key=lambda card: card.when)}
    return side_by_side(list(by_model.values()))


def read_scorecards(path: str | Path) -> list[Scorecard]:
    """Read the scorecards of a model folder (from its compression.json) or of a JSON file (one, or a list).

    Raises:
        BadInput: there are none, or something else is there.
    """
    path = Path(path)
    file = path / "compression.json" if path.is_dir() else path
    if not file.is_file():
        missing = f"The folder '{path}' has no compression.json" if path.is_dir() else f"There is no '{path}'"
        raise BadInput(f"{missing}; write a scorecard with: {EVALUATE}.")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"'{file}' is not JSON ({error}); write a scorecard with: {EVALUATE}.") from None
    if isinstance(document, dict) and "evaluations" in document:
        document = document["evaluations"]
    elif path.is_dir():
        document = []
    entries = document if isinstance(document, list) else [document]
    if not entries:
        raise BadInput(f"'{file}' holds no evaluation yet; add one with: {EVALUATE}.")
    return [_scorecard(entry, file) for entry in entries]


def _scorecard(entry: Any, file: Path) -> Scorecard:
    version = entry.get("schema_version") if isinstance(entry, dict) else None
    if isinstance(version, int) and version > 1:
        raise BadInput(
            f"'{file}' has a scorecard of schema version {version}, which a newer compress-model wrote; "
            "update compress-model to read it."
        )
    try:
        return Scorecard.model_validate_json(json.dumps(entry))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise BadInput(
            f"'{file}' contains something that is not a scorecard ({where}: {first['msg']}); "
            f"write one with: {EVALUATE}."
        ) from None


def protocol_fields(card: Scorecard) -> dict[str, object]:
    """What must be equal before scorecards compare: the protocol (but not the kernel) and the dense model."""
    if card.protocol is not None:
        fields = {"scored on": "text", **card.protocol.model_dump(exclude={"kernel"})}
    elif card.task_protocol is not None:
        fields = {"scored on": "a task file", **card.task_protocol.model_dump(exclude={"file", "kernel"})}
    else:
        return {}
    return {**fields, "baseline.sha256": card.baseline.sha256}


def newest_of_each_model(found: list[tuple[Scorecard, str]]) -> list[tuple[Scorecard, str]]:
    """One scorecard per model: the newest with the newest protocol that all models have in common.

    If there is no common protocol, the newest of each model, which :func:`side_by_side` refuses with the
    reason.
    """
    models: dict[str, list[tuple[Scorecard, str]]] = {}
    for card, file in found:
        models.setdefault(card.model.sha256, []).append((card, file))
    newest_first = [
        sorted(entries, key=lambda entry: entry[0].when, reverse=True) for entries in models.values()
    ]
    for candidate, _ in sorted(found, key=lambda entry: entry[0].when, reverse=True):
        wanted = protocol_fields(candidate)
        matching = [[e for e in entries if protocol_fields(e[0]) in (wanted, {})] for entries in newest_first]
        if wanted and all(matching):
            return [entries[0] for entries in matching]
    return [entries[0] for entries in newest_first]


def _refuse_different_protocols(scorecards: Sequence[Scorecard], files: Sequence[str]) -> None:
    scored = [
        (fields, file)
        for card, file in zip(scorecards, files, strict=True)
        if (fields := protocol_fields(card))
    ]
    for fields, file in scored[1:]:
        first, first_file = scored[0]
        different = [name for name in first if name in fields and first[name] != fields[name]]
        if different:
            name = different[0]
            more = f" (and {', '.join(different[1:])})" if different[1:] else ""
            raise BadInput(
                f"'{first_file}' and '{file}' were not evaluated in the same way: {name}{more} is "
                f"{_short(first[name])} in one and {_short(fields[name])} in the other; "
                "evaluate both again with the same options."
            )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _cells(card: Scorecard, dense: Scorecard | None) -> dict[str, Cell]:
    """Key of every column -> its cell for one model."""
    cost = card.cost
    cells: dict[str, Cell] = dict.fromkeys(column.key for column in COLUMNS)
    cells |= {
        "model": card.model.name,
        "size": cost.size,
        "bits_per_parameter": cost.bits_per_parameter,
        "parameters": cost.parameter_count,
        "kernel": _kernel(card),
        "loads_with": card.loads_with,
    }
    if dense:
        cells["size_ratio"] = Figure(value=cost.weight_bytes / dense.cost.weight_bytes)
    if fidelity := card.fidelity:
        cells |= {
            "perplexity": fidelity.perplexity,
            "perplexity_ratio": fidelity.perplexity_ratio,
            "kl_mean": fidelity.kl_mean,
            "top1_agreement": fidelity.top1_agreement,
        }
    if task := card.task:
        cells |= {
            "accuracy": task.accuracy,
            "exact_match": task.exact_match,
            "f1": task.f1,
            "macro_f1": task.macro_f1,
            "agreement": task.agreement,
            "mcnemar_p": task.mcnemar_p,
            "flops": task.flops,
        }
        if dense and dense.task:
            cells["flops_ratio"] = Figure(value=task.flops.value / dense.task.flops.value)
    if measured := cost.measured:
        cells |= {
            "latency": measured.latency if task else None,
            "peak_memory": measured.peak_memory,
            "added_memory": measured.added_memory,
            "peak_device_memory": measured.peak_device_memory,
            "prefill": measured.prefill,
            "decode": measured.decode,
        }
    return cells


def _caption(cards: list[Scorecard], dense: Scorecard | None) -> list[str]:
    """Sentences that say what the numbers mean and how they were made."""
    lines: list[str] = []
    scored, protocol = next(((card, card.protocol) for card in cards if card.protocol), (None, None))
    if scored and protocol:
        lines.append(
            f"Text: {protocol.text} (sha256 {_short(protocol.text_sha256)}), {protocol.windows:,} windows of "
            f"{protocol.context_tokens:,} tokens with stride {protocol.stride_tokens:,}; "
            f"{protocol.tokens_scored:,} tokens were scored in {protocol.compute_dtype}, with seed "
            f"{protocol.seed}."
        )
        if protocol.positions is not None:
            lines.append(
                f"The windows are longer than the {protocol.positions:,} tokens that the dense model was "
                "made for, so the figures say little about it."
            )
        lines.append(
            f"The dense model is {scored.baseline.name} (sha256 {_short(scored.baseline.sha256)}). "
            "Perplexity ratio, KL(dense ‖ model) over the full vocabulary and top-1 agreement compare each "
            "model with it token by token."
        )
        lines.append(
            "± is a 95 % interval (its wider side): Student's t clustered by window, which is paired for the "
            "ratio, and Wilson's interval for the agreement."
        )
    lines += _task_caption(cards)
    lines.append(
        "MB = 10^6 bytes. Size is the size of the weight files; bits per parameter = 8 × size ÷ the model's "
        "own parameters."
        + ("" if dense else " Sizes have no ratio, because no scorecard of the dense model was given.")
    )
    measured = [card.cost.measured for card in cards if card.cost.measured]
    if measured:
        before = sorted(m.baseline_resident_bytes for m in measured)
        lines.append(
            "Peak memory is the resident set of a fresh process, with interpreter and libraries, which take "
            f"{_range(Figure(value=size, unit='bytes').text for size in before)} MB before the model "
            "is loaded."
        )
        machines = sorted({f"{m.device}, {m.threads} thread{'s' * (m.threads > 1)}" for m in measured})
        prefill = _range(f"{n:,}" for n in sorted(m.prefill_tokens for m in measured))
        decode = _range(f"{n:,}" for n in sorted(m.decode_tokens or 0 for m in measured) if n)
        lines.append(
            f"Speed was measured at batch size 1 on {'; '.join(machines)}, as the median (interquartile "
            f"range) of a {'prefill' if scored else 'forward pass'} of {prefill} tokens"
            f"{f' and a greedy decode of {decode} tokens' if decode else ''}."
        )
        if len(machines) > 1:
            lines.append(
                "Models were timed on different machines or numbers of threads, so speeds do not compare."
            )
    return lines


def _task_caption(cards: list[Scorecard]) -> list[str]:
    """Sentences about the examples, what counts as right, the intervals and the test."""
    card, protocol = next(((card, card.task_protocol) for card in cards if card.task_protocol), (None, None))
    if card is None or protocol is None:
        return []
    task = protocol.task
    cut = f", {protocol.cut:,} of them cut off" if protocol.cut else ""
    inputs = f" in {protocol.inputs:,} inputs" if protocol.inputs != protocol.examples else ""
    return [
        f"Examples: {protocol.file} (sha256 {_short(protocol.file_sha256)}), {protocol.examples:,} for "
        f"{task}{inputs}{cut}, at most {protocol.longest_tokens:,} tokens long, scored in "
        f"{protocol.compute_dtype}.",
        f"The dense model is {card.baseline.name} (sha256 {_short(card.baseline.sha256)}). Agreement is the "
        "share of predictions that are equal to its own; p is that of McNemar's exact two-sided test on the "
        f"examples {RIGHT[task]} by only one of the two models.",
        INTERVALS[task],
        "FLOPs (a multiplication with its addition counts as two) and latency are for one input of mean "
        f"length, {protocol.mean_tokens:,} tokens.",
    ]


RIGHT = {
    "sequence classification": "labelled right",
    "token classification": "with every word labelled right",
    "question answering": "answered exactly right",
}
INTERVALS = {
    "sequence classification": "± is Wilson's 95 % interval (its wider side).",
    "token classification": (
        "± is a 95 % interval of Student's t clustered by example (its wider side). Macro F1 is the mean "
        "over the labels that occur."
    ),
    "question answering": (
        "± is a 95 % interval (its wider side): Wilson's, and Student's t for F1. Answers are normalised as "
        "in SQuAD."
    ),
}


def _range(texts: Iterable[str]) -> str:
    """``a``, or ``a to b`` from sorted texts; "" from none."""
    ends = list(dict.fromkeys(texts))
    return " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""


def _kernel(card: Scorecard) -> str | None:
    """The kernel that was timed, and the one that was used for scoring if that was another."""
    timed = card.cost.measured.kernel if card.cost.measured else None
    protocol = card.protocol or card.task_protocol
    scored = protocol.kernel if protocol else None
    return f"{timed} (scored: {scored})" if timed and scored and timed != scored else timed or scored
