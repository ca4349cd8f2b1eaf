"""compress-model bench: models side by side in processes of their own, and what is said where that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from compress.evaluation.bench import Bench, TimedModel, Times
from compress.evaluation.measure import speed
from compress.evaluation.statistics import median_of_pairs
from compress.evaluation.timed import Settings
from compress.storage.lineage import now

from .common import Command, assert_one_sentence

SHORT = ["--prefill-tokens", 16, "--decode-tokens", 4]


@pytest.mark.usefixtures("measured_here")
def test_the_document_and_the_table(tiny: Path, quantized: Path, command: Command) -> None:
    names = [tiny, quantized, f"{quantized}@dtype=float32"]
    document = command(
        "bench", *names, *SHORT, "--repetitions", 6, "--kernel", "reference", "--json"
    ).document
    dense, packed, own = document["models"]
    assert [row["name"] for row in document["models"]] == list(map(str, names))
    assert (dense["kernel"], packed["kernel"]) == ("torch", "reference")
    assert (packed["settings"]["dtype"], own["settings"]["dtype"]) == (None, "float32")
    assert (dense["prefill"]["tokens"], dense["decode"]["tokens"]) == (16, 4)
    assert len(packed["prefill"]["seconds"]) == document["repetitions"] == 6
    ratio = packed["decode"]["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert dense["decode"]["ratio"] is None
    alone = command("bench", tiny, *SHORT, "--repetitions", 1)
    assert (alone.code, "the first" in alone.out, "Prefill of 16 tokens" in alone.out) == (0, False, True)
    table = command("bench", *names, *SHORT, "--repetitions", 1, "-q")
    assert (table.code, table.err, "times" in table.out) == (0, "", True)


@pytest.mark.parametrize(
    ("repetitions", "on_gpu", "speeds", "times", "memory"),
    [
        (1, False, "the median of 1 repetition.", "each repetition.", "libraries included"),
        (
            3,
            False,
            "the median and the quartiles of 3 repetitions.",
            "each repetition.",
            "libraries included",
        ),
        (6, True, "quartiles of 6 repetitions.", "repetition, with its 95 % interval.", "allocated there"),
    ],
)
def test_the_lines_below_the_table_say_what_was_done(
    repetitions: int,
    on_gpu: bool,
    speeds: str,
    times: str,
    memory: str,
    tiny: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = [1.0 + number / 10 for number in range(repetitions)]
    ratio = median_of_pairs([1.0] * repetitions)

    def bench(*_: object) -> Bench:
        rows = [
            TimedModel(
                name=name,
                settings=Settings(),
                kernel="torch",
                threads=1,
                device="a processor",
                storage_dtype="float32",
                peak_resident_bytes=2,
                baseline_resident_bytes=1,
                peak_device_bytes=3 if on_gpu else None,
                prefill=Times(tokens=16, seconds=seconds, speed=speed(16, seconds), ratio=found),
            )
            for name, found in (("one", None), ("two", ratio))
        ]
        return Bench(models=rows, repetitions=repetitions, prompt_tokens=1, when=now(), versions={})

    monkeypatch.setattr("compress.evaluation.bench.bench", bench)
    said = " ".join(command("bench", tiny, tiny).out.split())
    for words in (speeds, times, memory):
        assert words in said
    assert ("libraries included" in said) != on_gpu


def test_two_processes_and_real_memory(tiny: Path, quantized: Path, command: Command) -> None:
    ended = command("bench", tiny, quantized, *SHORT, "--repetitions", 1, "--threads", 1, "--json")
    assert ended.code == 0, ended.err
    for row in ended.document["models"]:
        assert row["peak_resident_bytes"] > row["baseline_resident_bytes"] > 50e6
        assert row["threads"] == 1


def test_a_wrong_path_is_said_before_anything_is_loaded(tiny: Path, command: Command) -> None:
    assert_one_sentence(command("bench", tiny, "./nowhere"), 2, "no model folder './nowhere'")
    assert_one_sentence(command("bench", f"{tiny}@kernel"), 2, "is not NAME=VALUE")
    assert_one_sentence(
        command("bench", tiny, "--device", "abacus", "-q"), 2, "device 'abacus' cannot be used"
    )


def test_a_kernel_that_does_not_exist(tiny: Path, command: Command) -> None:
    ended = command("bench", f"{tiny}@kernel=abacus", *SHORT, "-q")
    assert_one_sentence(
        ended, 2, "failed: There is no kernel 'abacus'; this machine can run: auto, reference"
    )


def test_evaluate_takes_a_kernel(tiny: Path, command: Command) -> None:
    ended = command("evaluate", tiny, "--kernel", "abacus", "-q")
    assert_one_sentence(ended, 2, "There is no kernel 'abacus'; this machine can run: auto, reference")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupt_leaves_no_process(number: int, code: int, tiny: Path, quantized: Path) -> None:
    words = ["bench", tiny, quantized, *SHORT, "--repetitions", 10**6, "--threads", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "timing" not in process.stderr.readline():
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert said.splitlines()[-1].startswith("Error: Interrupted")
        assert "Traceback" not in said
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert (len(gone), alive) == (2, [])


def test_a_model_whose_process_dies_is_named(tiny: Path, quantized: Path) -> None:
    words = ["bench", tiny, quantized, *SHORT, "--repetitions", 10**6, "--threads", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while "timing" not in process.stderr.readline():
        assert process.poll() is None
    first, second = sorted(psutil.Process(process.pid).children(), key=lambda child: child.create_time())
    second.kill()
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    sentence = said.splitlines()[-1]
    assert sentence.startswith(f"Error: Measuring {quantized} failed: killed by signal 9")
    psutil.wait_procs([first], timeout=60)
    assert not first.is_running()
