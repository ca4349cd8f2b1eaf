"""Time several models side by side, so that a busy machine hits all of them alike.

Each model lives in a process of its own. Within every repetition they take turns, a prefill of each and then
a decode of each, and every repetition begins with another one. So what slows the machine down for a while
slows all of them, and the ratio of two models within a repetition tells more than their speeds do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from compress.errors import BadInput, unknown
from compress.evaluation.measure import ModelProcess, Timeable, speed
from compress.evaluation.statistics import median_of_pairs
from compress.evaluation.timed import Settings
from compress.report.scorecard import Document, Figure
from compress.sources.find import find_model
from compress.storage.lineage import now, versions
from compress.system.progress import Progress

WARM_UP_TOKENS = 4
"""Tokens of a decode that fills caches and is not counted."""


@dataclass(frozen=True)
class Contestant:
    """A model to time.

    Attributes:
        name: as the user gave it.
        folder: where it is.
        settings: how to load and run it.
    """

    name: str
    folder: Path
    settings: Settings

    def process(self) -> ModelProcess:
        """A process for it, which starts in a ``with`` statement."""
        return ModelProcess(self.folder, self.settings, self.name)


class Times(Document):
    """One kind of work by one model."""

    tokens: PositiveInt
    seconds: list[PositiveFloat]
    speed: Figure
    ratio: Figure | None = None
    """How many times as fast as the first model: the median of the ratios within each repetition."""


class TimedModel(Document):
    """One row of a bench."""

    name: str
    settings: Settings
    kernel: str
    threads: PositiveInt
    device: str
    storage_dtype: str
    peak_resident_bytes: PositiveInt
    baseline_resident_bytes: PositiveInt
    peak_device_bytes: NonNegativeInt | None = None
    prefill: Times
    decode: Times | None = None

    @property
    def peak_memory(self) -> Figure:
        """What the process takes with its libraries; on a GPU, what is allocated there."""
        found = self.peak_resident_bytes if self.peak_device_bytes is None else self.peak_device_bytes
        return Figure(value=found, unit="bytes")


class Bench(Document):
    """What `bench` returns."""

    schema_version: Literal[1] = 1
    models: list[TimedModel]
    repetitions: PositiveInt
    prompt_tokens: PositiveInt
    """In the prompt before a decode, whose time does not count."""
    when: AwareDatetime
    versions: dict[str, str]


REVISION = "revision="
"""How the name of a model on the hub begins to say which of its revisions is meant."""


def contestant(name: str, settings: Settings, revision: str | None = None) -> Contestant:
    """A model by its name, which may end in settings of its own: ``FOLDER@kernel=reference,threads=1``.

    Args:
        name: a folder, a hub id or ``demo``; after an ``@``, settings named like the options of the command,
            ``revision`` among them.
        settings: where the name has none.
        revision: of a model on the hub, where the name has none.

    Raises:
        BadInput: there is no such model or setting.
    """
    model, at, own = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():
        return Contestant(name, find_model(name, revision).folder, settings)
    parts = own.split(",")
    if stated := [part for part in parts if part.startswith(REVISION)]:
        parts, revision = [part for part in parts if part not in stated], stated[-1].removeprefix(REVISION)
    changes = dict(_setting(name, part) for part in parts)
    try:
        found = Settings.model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        what = str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"In '{name}', {what}: {first['msg']} (got {first['input']}).") from None
    return Contestant(name, find_model(model, revision).folder, found)


def _setting(name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    field, names = key.strip().replace("-", "_"), [each.replace("_", "-") for each in Settings.model_fields]
    if not equals:
        raise BadInput(f"'{text}' in '{name}' is not NAME=VALUE; write MODEL@kernel=reference.")
    if field not in Settings.model_fields:
        raise unknown("setting", key, [*names, "revision"])
    return field, int(value) if value.isdecimal() else value


def bench(
    contestants: Sequence[Contestant],
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    repetitions: int = 9,
    progress: Progress = lambda text, share: None,
) -> Bench:
    """Time models side by side.

    Args:
        contestants: the models; the others are compared with the first.
        prefill_tokens: in the prompt of a prefill; fewer if one of the models takes no more.
        decode_tokens: that a decode generates; fewer if one of the models takes no more.
        repetitions: of both, after a warm-up.
        progress: called with a text and the share that is done.

    Raises:
        BadInput: a number is below 1, or a model cannot be loaded in this way.
        CompressError: the process of a model failed.
    """
    if min(prefill_tokens, decode_tokens, repetitions) < 1:
        raise BadInput("Tokens and repetitions of a measurement must be at least 1.")
    with ExitStack() as processes:
        models: list[Timeable] = []
        for place, each in enumerate(contestants):
            progress("loading", place / len(contestants))
            models.append(processes.enter_context(each.process()))
        progress("loading", 1.0)
        prompt = max(model.prompt_tokens for model in models)
        prefill_tokens = min(prefill_tokens, *(model.longest for model in models))
        decode_tokens = max(1, min(decode_tokens, *(model.longest - prompt for model in models)))
        for model in models:
            model.prefill(prefill_tokens)
            if model.generates:
                model.decode(min(WARM_UP_TOKENS, decode_tokens))
        seconds = _interleaved(models, prefill_tokens, decode_tokens, repetitions, progress)
        states = [model.state() for model in models]
    rows = [
        TimedModel(
            name=each.name,
            settings=each.settings,
            prefill=_times(prefill_tokens, prefills, seconds[0][0]),
            decode=_times(decode_tokens, decodes, seconds[0][1]) if decodes else None,
            **state,
        )
        for each, (prefills, decodes), state in zip(contestants, seconds, states, strict=True)
    ]
    return Bench(models=rows, repetitions=repetitions, prompt_tokens=prompt, when=now(), versions=versions())


Seconds = tuple[list[float], list[float]]
"""What every prefill and every decode of one model took."""


def _interleaved(
    models: Sequence[Timeable],
    prefill_tokens: int,
    decode_tokens: int,
    repetitions: int,
    progress: Progress,
) -> list[Seconds]:
    seconds: list[Seconds] = [([], []) for _ in models]
    for repetition in range(repetitions):
        progress("timing", repetition / repetitions)
        order = [(place + repetition) % len(models) for place in range(len(models))]
        for index in order:
            seconds[index][0].append(models[index].prefill(prefill_tokens))
        for index in order:
            if models[index].generates:
                seconds[index][1].append(models[index].decode(decode_tokens))
    progress("timing", 1.0)
    return seconds


def _times(tokens: int, mine: list[float], first: list[float]) -> Times:
    """The speed of a model, and its ratio to that of the first, unless it is the first or that has none."""
    ratios = [a / b for a, b in zip(first, mine, strict=False)] if mine is not first else []
    return Times(
        tokens=tokens,
        seconds=mine,
        speed=speed(tokens, mine),
        ratio=median_of_pairs(ratios) if ratios else None,
    )
