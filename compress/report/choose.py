"""Read scorecards, and choose of each model those that were made in the same way as the others'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from compress.errors import BadInput
from compress.report.columns import printable
from compress.report.scorecard import Scorecard
from compress.storage.lineage import Lineage, read_lineage, record_of

EVALUATE = "compress-model evaluate MODEL --baseline DENSE --json FILE"


class Found(NamedTuple):
    """A scorecard, and the file or model to name in an error message."""

    card: Scorecard
    file: str


def read_scorecards(path: str | Path) -> list[Scorecard]:
    """Read the scorecards in the record of a model folder or .gguf file, or in a JSON file (one, or a list).

    Raises:
        BadInput: there are none, or something else is there.
    """
    if not str(path):
        raise BadInput("An empty name is no model; name a folder, a file or a hub id.")
    path = Path(path)
    file = record_of(path) if path.is_dir() or path.suffix.lower() == ".gguf" else path
    document = _read(path, file)
    if path.is_file() and file != path:
        read_lineage(path)  # refuses the record of another file
    if isinstance(document, dict) and "evaluations" in document:
        document = document["evaluations"]
    elif file != path:
        document = []
    entries = document if isinstance(document, list) else [document]
    if not entries:
        raise BadInput(f"'{file}' holds no evaluation yet; add one with: {EVALUATE}.")
    return [_scorecard(entry, file) for entry in entries]


def _read(path: Path, file: Path) -> Any:
    if not file.is_file():
        missing = f"'{path}' has no {file.name}" if path.exists() else f"There is no '{path}'"
        raise BadInput(f"{missing}; write a scorecard with: {EVALUATE}.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"'{file}' is not JSON ({error}); write a scorecard with: {EVALUATE}.") from None


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


def read_lineages(path: str | Path) -> dict[str, Lineage]:
    """Hash of a model -> how it was made, for the models of a folder or GGUF file; empty if unknown.

    The scorecards in a folder are of its own model (or of several sizes of it) and of the dense one.
    """
    try:
        lineage = read_lineage(Path(path))
    except BadInput:
        lineage = None
    if lineage is None:
        return {}
    cards = read_scorecards(path)
    own = [card for card in cards if not card.is_dense] or cards
    return {card.model.sha256: lineage for card in own}


def protocol_fields(card: Scorecard) -> dict[str, object]:
    """What must be equal before scores compare: the protocol (but not the kernel) and the dense model.

    Empty if neither text nor labelled examples were scored. Tasks of lm-eval are not in it: they compare one
    by one (see :mod:`compress.report.asked`).
    """
    if card.protocol is not None:
        fields = {"scored on": "text", **card.protocol.model_dump(exclude={"kernel"})}
    elif card.task_protocol is not None:
        fields = {"scored on": "a task file", **card.task_protocol.model_dump(exclude={"file", "kernel"})}
    else:
        return {}
    return {**fields, "baseline.sha256": card.baseline.sha256}


def harness_fields(card: Scorecard) -> dict[str, object]:
    """How tasks were asked; empty if none were."""
    protocol = card.harness_protocol
    return protocol.model_dump(exclude={"kernel", "suite"}) if protocol else {}


Way = Callable[[Scorecard], dict[str, object]]
WAYS: tuple[Way, ...] = (protocol_fields, harness_fields)


def newest_of_each_model(found: Iterable[Found]) -> list[Found]:
    """One scorecard per model: the newest scores, and the newest answers to tasks, that all have in common.

    If scores and answers to tasks are on different scorecards, the result joins the two. Where the models
    have nothing in common, the newest of each is taken: :func:`refuse_different_protocols` refuses scores
    with the reason, and tasks are marked.
    """
    models = _of_one_baseline(_by_model(found))
    scored, asked = (_in_common(models, way) for way in WAYS)
    return [_joined(*each) for each in zip(models, scored, asked, strict=True)]


def same_weights(found: Sequence[Found], chosen: Sequence[Found]) -> list[str]:
    """Sentences about models that share a row, because their weights are the same.

    Args:
        found: all scorecards.
        chosen: those of them that are shown.
    """
    models = {entries[0].card.model.sha256: entries for entries in _by_model(found)}
    sentences = []
    for card, file in chosen:
        newest = {entry.file: entry.card.model.name for entry in reversed(models[card.model.sha256])}
        others = dict.fromkeys(name for of, name in newest.items() if of != file)
        sentences += [
            printable(f"{name} has the same weights as {card.model.name}, so they share a row.")
            for name in others
            if name != card.model.name
        ]
    return sentences


def newest_of_history(cards: Sequence[Scorecard]) -> list[Scorecard]:
    """One scorecard per model of one model's own history, in which evaluations of any kind follow each other.

    The newest one that is not the dense model's decides how text was scored, and which tasks were asked.
    """
    latest = max(cards, key=_rank)
    alike = [card for card in cards if card.baseline.sha256 == latest.baseline.sha256]
    wanted = [_newest(alike, way) for way in WAYS]
    chosen = []
    for entries in _by_model(Found(card, card.model.name) for card in alike):
        scored, asked = (_first(entries, *each) for each in zip(WAYS, wanted, strict=True))
        if scored or asked or not any(wanted):
            chosen.append(_joined(entries, scored, asked).card)
    return chosen


def _newest(cards: Sequence[Scorecard], way: Way) -> dict[str, object]:
    """How the newest card was made; empty if none was made in a way of this kind."""
    made = [card for card in cards if way(card)]
    return way(max(made, key=_rank)) if made else {}


def _rank(card: Scorecard) -> tuple[bool, Any]:
    return not card.is_dense, card.when


def _by_model(found: Iterable[Found]) -> list[list[Found]]:
    """The scorecards of each model, the newest first."""
    models: dict[str, list[Found]] = {}
    for entry in found:
        models.setdefault(entry.card.model.sha256, []).append(entry)
    return [sorted(entries, key=lambda entry: entry.card.when, reverse=True) for entries in models.values()]


def _of_one_baseline(models: list[list[Found]]) -> list[list[Found]]:
    """Only the scorecards with the newest dense model that all models have in common, if they have one.

    A dense model that is only in the history of others, and not the one they have in common, is left out.
    """
    histories = {entry.file for entries in models for entry in entries if not entry.card.is_dense}
    tried = []
    for card in _newest_first(models):
        kept = []
        for entries in models:
            ours = [entry for entry in entries if entry.card.baseline.sha256 == card.baseline.sha256]
            if ours or not all(entry.card.is_dense and entry.file in histories for entry in entries):
                kept.append((ours, entries))
        if all(ours for ours, _ in kept):
            return [ours for ours, _ in kept]
        tried.append([ours or entries for ours, entries in kept])
    return tried[0] if tried else models


def _in_common(models: list[list[Found]], way: Way) -> list[Found | None]:
    """Choose each model's newest scorecard of the newest kind that all models have, or else its newest."""
    made = [[entry for entry in entries if way(entry.card)] for entries in models]
    for card in _newest_first(made):
        alike = [_first(entries, way, way(card)) for entries in made]
        if all(one or not entries for one, entries in zip(alike, made, strict=True)):
            return alike
    return [entries[0] if entries else None for entries in made]


def _newest_first(models: list[list[Found]]) -> list[Scorecard]:
    cards = [entry.card for entries in models for entry in entries]
    return sorted(cards, key=lambda card: card.when, reverse=True)


def _first(entries: list[Found], way: Way, wanted: dict[str, object]) -> Found | None:
    return next((entry for entry in entries if wanted and way(entry.card) == wanted), None)


def _joined(entries: list[Found], scored: Found | None, asked: Found | None) -> Found:
    """One scorecard with the scores of one and the answers to tasks of the other."""
    card, file = scored or asked or entries[0]
    if asked is None or asked is scored:
        return Found(card, file)
    tasks = {"harness_protocol": asked.card.harness_protocol, "harness": asked.card.harness}
    cost = card.cost if card.cost.measured else asked.card.cost
    return Found(card.model_copy(update={**tasks, "cost": cost}), file)


def refuse_different_protocols(found: Sequence[Found]) -> None:
    """Refuse scores that do not compare.

    Raises:
        BadInput: two scorecards were not made in the same way, or not against the same dense model.
    """
    against = "baseline.sha256"
    made = [
        (protocol_fields(card) or {against: card.baseline.sha256}, file)
        for card, file in found
        if protocol_fields(card) or card.harness
    ]
    for index, (fields, file) in enumerate(made):
        for first, first_file in made[:index]:
            different = [name for name in first if name in fields and first[name] != fields[name]]
            if different:
                more = f" (and {', '.join(different[1:])})" if different[1:] else ""
                raise BadInput(
                    f"'{first_file}' and '{file}' were not evaluated in the same way: {different[0]}{more} "
                    f"is {short(first[different[0]])} in one and {short(fields[different[0]])} in the other; "
                    "evaluate both again with the same options."
                )


def short(value: object) -> str:
    """A value as text, of a hash the first 12 digits."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
