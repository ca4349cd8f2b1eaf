"""The columns of a comparison, and what each of them says about one model."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from compress.report.forgetting import newest_audit
from compress.report.scorecard import UNITS, Figure, Scorecard, TaskResult
from compress.storage.lineage import Lineage

Cell = Figure | str | None
Level = Literal["brief", "page", "data"]


class Column(NamedTuple):
    """A column of the comparison.

    Attributes:
        key: its name in CSV and JSON.
        title: its title in tables.
        unit: the unit of its figures, a key of `UNITS`.
        section: what models must have been scored or measured on for the column to be shown; "" shows it
            always.
        group: the heading that it shares with its neighbours.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        timed: whether the machine decides the figures, so that those of two machines do not compare.
        level: the narrowest kind of table that shows it: tables for people, the page, or CSV and JSON.
        task: the task of lm-eval that it is of.
    """

    key: str
    title: str
    unit: str = ""
    section: Literal["", "text", "task", "device", "speed", "energy", "made", "harness", "audit"] = ""
    group: str = ""
    better: int = 0
    timed: bool = False
    level: Level = "brief"
    task: str = ""

    @property
    def heading(self) -> str:
        """Title and unit on two lines."""
        shown = UNITS[self.unit].heading
        return f"{self.title}\n({shown})" if shown else self.title


SIZE, TEXT, LABELLED, ALL_TASKS = "size", "text", "labelled examples", "all tasks"
FORGETTING = "what was unlearned"
MEMORY, SPEED, SOFTWARE = "memory", "speed", "software"

MODEL = (
    Column("model", "model"),
    Column("made_by", "made by", section="made", level="page"),
    Column("size", "size", "bytes", group=SIZE, better=-1),
    Column("size_ratio", "size ÷\ndense", group=SIZE, better=-1),
    Column("bits_per_parameter", "bits per\nparameter", group=SIZE, better=-1),
    Column("parameters", "parameters", "parameters", group=SIZE),
)
QUALITY = (
    Column("perplexity", "perplexity", "", "text", TEXT, -1),
    Column("perplexity_ratio", "perplexity\n÷ dense", "", "text", TEXT, -1),
    Column("kl_mean", "KL from dense", "nats/token", "text", TEXT, -1),
    Column("top1_agreement", "top-1\nagreement", "fraction", "text", TEXT, 1),
    Column("accuracy", "accuracy", "fraction", "task", LABELLED, 1),
    Column("exact_match", "exact match", "fraction", "task", LABELLED, 1),
    Column("f1", "F1", "fraction", "task", LABELLED, 1),
    Column("macro_f1", "macro F1", "fraction", "task", LABELLED, 1),
    Column("agreement", "agreement\nwith dense", "fraction", "task", LABELLED, 1),
    Column("mcnemar_p", "McNemar's p\nagainst dense", "", "task", LABELLED),
    Column("flops", "FLOPs", "flops", "task", LABELLED, -1),
    Column("flops_ratio", "FLOPs ÷\ndense", "", "task", LABELLED, -1),
    Column("latency", "latency", "seconds", "task", LABELLED, -1, timed=True),
)
VERDICT = (
    Column("tasks_change", "score change\n(points)", "", "harness", ALL_TASKS, 1),
    Column("tasks_lost", "answers\nlost", "questions", "harness", ALL_TASKS),
    Column("tasks_gained", "answers\ngained", "questions", "harness", ALL_TASKS),
    Column("verdict", "verdict", "", "harness", ALL_TASKS),
    Column("tasks_matching", "matching\n(tasks)", "", "harness", ALL_TASKS, level="page"),
    Column("tasks_questions", "questions", "questions", "harness", ALL_TASKS, level="page"),
    Column("tasks_needed", "questions\nthat decide", "questions", "harness", ALL_TASKS, level="page"),
    Column("margin", "margin", "fraction", "harness", ALL_TASKS, level="data"),
    Column("worse_p", "p that it\nis worse", "", "harness", ALL_TASKS, level="data"),
    Column("margin_p", "p that it is\nnot worse", "", "harness", ALL_TASKS, level="data"),
)
AUDIT = (
    Column("recovery", "recovery", "", "audit", FORGETTING, -1),
    Column("highest_recovery", "highest\nrecovery", "", "audit", FORGETTING, -1),
    Column("highest_after", "highest\nafter", "", "audit", FORGETTING, level="page"),
    Column("utility_change", "utility\nchange", "fraction", "audit", FORGETTING, 1),
    Column("forgotten", "audit", "", "audit", FORGETTING),
)
COST = (
    Column("peak_memory", "peak memory", "bytes", group=MEMORY, better=-1, timed=True),
    Column("added_memory", "memory added\nby the model", "bytes", group=MEMORY, better=-1, timed=True),
    Column(
        "peak_device_memory", "peak memory\nof the device", "bytes", "device", MEMORY, better=-1, timed=True
    ),
    Column("prefill", "prefill", "tokens/s", "speed", SPEED, 1, timed=True),
    Column("decode", "decode", "tokens/s", "speed", SPEED, 1, timed=True),
    Column("decode_energy", "energy of\na decode", "joules/token", "energy", SPEED, -1, timed=True),
    Column("kernel", "kernel", group=SOFTWARE),
    Column("loads_with", "loads with", group=SOFTWARE),
)


def task_columns(cards: Iterable[Scorecard]) -> list[Column]:
    """The columns of every task that a model was asked, in the order in which tasks were asked."""
    results = [result for card in cards if card.harness for result in card.harness.tasks]
    tasks = dict.fromkeys(result.task for result in results)
    return [column for task in tasks for column in _of_task(task, results)]


def _of_task(task: str, results: Sequence[TaskResult]) -> list[Column]:
    def column(name: str, title: str, unit: str = "", level: Level = "page", better: int = 0) -> Column:
        return Column(
            f"{task}.{name}", title, unit, "harness", printable(task), better, level=level, task=task
        )

    units = {
        name: figure.unit
        for result in results
        if result.task == task
        for name, figure in result.others.items()
    }
    return [
        column("score", "score", "fraction", "brief", 1),
        column("change", "change\n(points)", better=1),
        column("flips", "flips", "fraction"),
        column("lost", "lost", "questions"),
        column("gained", "gained", "questions"),
        column("holm_p", "p (Holm)"),
        column("matching", "matching"),
        *(
            column(f"judged.{judge}", f"preferred by\njudge {judge[:8]}", "fraction", "brief", 1)
            for judge in dict.fromkeys(
                result.judged.judge for result in results if result.task == task and result.judged
            )
        ),
        column("p", "p", level="data"),
        *(column(name, printable(name), unit, "data") for name, unit in units.items()),
    ]


def cells_of(card: Scorecard, dense: Scorecard | None, lineage: Lineage | None) -> dict[str, Cell]:
    """Key of every column -> its cell for one model; a key that is missing was not measured."""
    cost = card.cost
    cells: dict[str, Cell] = {
        "model": card.model.name,
        "made_by": made_by(lineage) if lineage else None,
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
    if measured := cost.measured:
        cells |= {
            "latency": measured.latency if card.task else None,
            "peak_memory": measured.peak_memory,
            "added_memory": measured.added_memory,
            "peak_device_memory": measured.peak_device_memory,
            "prefill": _with_spread(measured.prefill),
            "decode": _with_spread(measured.decode),
            "decode_energy": measured.decode_energy,
        }
    return cells | _of_labelled_examples(card, dense) | _of_tasks(card) | _of_audit(lineage)


def _with_spread(speed: Figure | None) -> Figure | None:
    """A speed that shows how much it varies, or None: a single repetition may have had a busy machine."""
    return speed if speed and speed.low is not None else None


def printable(text: str) -> str:
    """A name that comes from a file, on one line and without what would command a terminal or turn the text
    around."""
    harmless = (character for character in " ".join(text.split()) if character not in TURNS)
    return "".join("�" if unicodedata.category(character) == "Cc" else character for character in harmless)


TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""The characters that set the direction of the text after them."""


def made_by(lineage: Lineage) -> str:
    """The methods that made a model, in order."""
    methods = [step.method for link in lineage.chain() for step in link.steps]
    return " → ".join(methods) or "stored again"


def _of_labelled_examples(card: Scorecard, dense: Scorecard | None) -> dict[str, Cell]:
    task = card.task
    if task is None:
        return {}
    cells: dict[str, Cell] = {
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
    return cells


def _of_tasks(card: Scorecard) -> dict[str, Cell]:
    harness = card.harness
    if harness is None:
        return {}
    cells: dict[str, Cell] = {}
    if card.is_dense:
        cells["tasks_change"] = Figure(value=0.0, unit="fraction")  # from itself, so it is known exactly
    for result in harness.tasks:
        cells |= {f"{result.task}.{name}": cell for name, cell in _of_result(result).items()}
    if verdict := harness.verdict:
        judged = [result.matching for result in harness.tasks if result.matching is not None]
        cells |= {
            "tasks_change": verdict.change,
            "tasks_lost": _total(result.lost for result in harness.tasks),
            "tasks_gained": _total(result.gained for result in harness.tasks),
            "verdict": verdict.kind,
            "tasks_matching": f"{sum(judged)} of {len(judged)}" if judged else None,
            "tasks_questions": _count(verdict.questions),
            "tasks_needed": _count(verdict.needed),
            "margin": Figure(value=verdict.margin, unit="fraction"),
            "worse_p": verdict.worse_p,
            "margin_p": verdict.margin_p,
        }
    return cells


def _of_audit(lineage: Lineage | None) -> dict[str, Cell]:
    audit = newest_audit(lineage) if lineage else None
    if audit is None:
        return {}
    own, highest = audit.own, audit.highest
    return {
        "recovery": own.knowledge.recovery,
        "highest_recovery": highest.knowledge.recovery if highest else None,
        "highest_after": highest.name if highest else None,
        "utility_change": own.utility.change if own.utility else None,
        "forgotten": audit.kind,
    }


def _of_result(result: TaskResult) -> dict[str, Cell]:
    return {
        "score": result.score,
        "change": result.change,
        "flips": result.flips,
        "lost": _count(result.lost),
        "gained": _count(result.gained),
        "holm_p": result.holm_p,
        "matching": None if result.matching is None else "yes" if result.matching else "no",
        "p": result.p,
        **({f"judged.{result.judged.judge}": result.judged.score} if result.judged else {}),
        **result.others,
    }


def _count(number: int | None) -> Figure | None:
    return None if number is None else Figure(value=number, unit="questions")


def _total(numbers: Iterable[int | None]) -> Figure | None:
    """The sum, unless no task counts flips."""
    known = [number for number in numbers if number is not None]
    return _count(sum(known)) if known else None


def _kernel(card: Scorecard) -> str | None:
    """The kernel that was timed, and the one that was used for scoring if that was another."""
    timed = card.cost.measured.kernel if card.cost.measured else None
    protocol = card.protocol or card.task_protocol or card.harness_protocol
    scored = protocol.kernel if protocol else None
    return f"{timed} (scored: {scored})" if timed and scored and timed != scored else timed or scored
