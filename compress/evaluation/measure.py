"""Measure the speed and memory of models, each of which is alone in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from compress.errors import BadInput, CompressError
from compress.evaluation.timed import PROMPT_TOKENS, Settings
from compress.report.scorecard import Figure, Measurement, UnitName

BUDGET_SECONDS = 8.0
"""Seconds for the prefill with its warm-up, and as many for the decode. If time is short, the prefill loses
repetitions first, because its speed depends on its length, and the decode loses tokens first."""

FEWEST_DECODE_TOKENS = 4
"""Tokens that a decode generates however slow the model is."""


class Timeable(Protocol):
    """A model that can be timed: `compress.evaluation.timed.Timed`, or one in another process."""

    longest: int
    generates: bool

    @property
    def prompt_tokens(self) -> int: ...
    def prefill(self, tokens: int) -> float: ...
    def decode(self, tokens: int) -> float: ...
    def joules(self) -> list[float]: ...
    def state(self) -> dict[str, Any]: ...


class ModelProcess:
    """A model folder in a process of its own, from ``with`` until its end; see `Timed` for what it is asked.

    It takes no processor time between two questions. It ends with the ``with`` statement in any case, and on
    its own if this process is killed.

    Args:
        folder: for ``compress.load``.
        settings: how to load and run it.
        name: what messages call the model.

    Raises:
        BadInput: from ``with`` or any question: the child refused its input (it exited with code 2).
        CompressError: the child failed; the message has the last line that it wrote to stderr.
    """

    longest: int
    generates: bool
    prompt_tokens: int

    def __init__(self, folder: str | Path, settings: Settings, name: str = "") -> None:
        self._name = name or str(folder)
        # -P: a folder named "compress" in the working directory must not be taken for this package.
        self._command = [sys.executable, "-P", "-m", "compress.evaluation.timed"]
        self._command += [str(folder), settings.model_dump_json()]

    def __enter__(self) -> Self:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # a pipe that nobody reads would fill up
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            vars(self).update(self._answer())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            assert stream is not None
            with suppress(BrokenPipeError):  # a question that the child has not read
                stream.close()

    def prefill(self, tokens: int) -> float:
        return self._ask("prefill", tokens)

    def decode(self, tokens: int) -> float:
        return self._ask("decode", tokens)

    def joules(self) -> list[float]:
        return self._ask("joules")

    def state(self) -> dict[str, Any]:
        return self._ask("state")

    def _ask(self, *question: str | int) -> Any:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            print(json.dumps(question), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        if (line := self._child.stdout.readline()).endswith("\n"):  # a child that dies may leave half a line
            return json.loads(line)
        code = self._child.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        reason = lines[-1] if lines else "it gave no reason"
        if code < 0:
            reason = f"killed by signal {-code} (9 is usually out of memory); last line: {reason}"
        error = BadInput if code == BadInput.exit_code else CompressError
        raise error(f"Measuring {self._name} failed: {reason}{'' if reason.endswith(('.', '?')) else '.'}")


def measure(
    folder: str | Path,
    settings: Settings | None = None,
    prefill_tokens: int = 512,
    decode_tokens: int = 128,
    repetitions: int = 5,
) -> Measurement:
    """Measure a model folder in a process of its own.

    Args:
        folder: a folder for ``compress.load``.
        settings: how to load and run it.
        prefill_tokens, decode_tokens: wanted lengths in tokens; the result states the lengths that were
            timed.
        repetitions: number of timed repetitions of each, after one that is not timed.

    Raises:
        BadInput: a number is below 1, or the model cannot be loaded in this way.
        CompressError: the child failed.
    """
    if min(prefill_tokens, decode_tokens, repetitions) < 1:
        raise BadInput("Tokens and repetitions of a measurement must be at least 1.")
    with ModelProcess(folder, settings or Settings()) as model:
        return measured(model, prefill_tokens, decode_tokens, repetitions)


def measured(
    model: Timeable, prefill_tokens: int = 512, decode_tokens: int = 128, repetitions: int = 5
) -> Measurement:
    """The measurement of one model. Arguments are those of `measure`."""
    prefill_seconds, prefill_tokens = time_prefill(model, prefill_tokens, repetitions)
    decoded: dict[str, Any] = {}
    if model.generates:
        decode_seconds, decode_tokens = time_decode(model, decode_tokens, repetitions)
        decoded = {
            "decode": speed(decode_tokens, decode_seconds),
            "decode_tokens": decode_tokens,
            "decode_repetitions": len(decode_seconds),
            "decode_energy": energy(model.joules()[-len(decode_seconds) :]),
        }
    return Measurement(
        prefill=speed(prefill_tokens, prefill_seconds),
        prefill_tokens=prefill_tokens,
        prefill_repetitions=len(prefill_seconds),
        **decoded,
        **model.state(),
    )


def time_prefill(model: Timeable, tokens: int, repetitions: int) -> tuple[list[float], int]:
    """Seconds of each repetition, and the length of the prompt in tokens."""
    tokens = min(tokens, model.longest)
    probe = min(PROMPT_TOKENS, tokens)
    model.prefill(probe)  # the first call takes longer, because it fills caches
    per_token = model.prefill(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / 2 / per_token)))
    return repeat(lambda: model.prefill(tokens), repetitions), tokens


def time_decode(model: Timeable, tokens: int, repetitions: int) -> tuple[list[float], int]:
    """Seconds of each repetition, and how many tokens each of them generated after a short prompt."""
    tokens = max(1, min(tokens, model.longest - model.prompt_tokens))
    probe = min(FEWEST_DECODE_TOKENS, tokens)
    per_token = model.decode(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / (repetitions + 1) / per_token)))
    return repeat(lambda: model.decode(tokens), repetitions), tokens


def repeat(once: Callable[[], float], repetitions: int) -> list[float]:
    """Seconds of as many repetitions as the budget allows, after a warm-up if there is time for two."""
    timed = [once()]
    while len(timed) <= repetitions and sum(timed) + timed[-1] <= BUDGET_SECONDS:
        timed.append(once())
    return timed[1:] or timed


def speed(tokens: int, timed: list[float]) -> Figure:
    """Tokens per second: the median with the interquartile range, which needs three repetitions."""
    return _median([tokens / each for each in timed], "tokens/s")


def energy(joules: list[float]) -> Figure | None:
    """Joules per token, likewise; None if they do not show how much they vary."""
    return _median(joules, "joules/token") if len(joules) >= 3 else None


def _median(values: list[float], unit: UnitName) -> Figure:
    low, median, high = None, statistics.median(values), None
    if len(values) >= 3:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        low, high = min(low, median), max(high, median)  # of equal values, interpolation may round past them
    return Figure(value=median, low=low, high=high, unit=unit, spread="interquartile range")
