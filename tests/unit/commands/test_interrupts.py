"""SIGINT and SIGTERM at planted moments: one sentence, the right exit code, and no traceback."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compress
from compress.commands.common import progress_shown
from compress.system import interrupts

from .common import Ended

PLANTED = """
import atexit, os, signal, sys, threading, time
from compress.__main__ import main
from compress.system import interrupts

def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)

def once(work, convert):
    "Sends a signal when it is first called, and does with KeyboardInterrupt what C and Rust libraries do."
    def call(*args, **kwargs):
        global once_done
        if not once_done:
            once_done = True
            try:
                send()
            except KeyboardInterrupt:
                if convert is not None:
                    raise convert from None
        return work(*args, **kwargs)
    return call

once_done = False
sys.argv = ["compress-model", "recipes", "--json"]
import compress.commands.recipes as commands  # which imports nothing heavy
print_json = commands.print_json
"""


def planted(plant: str) -> Ended:
    """Runs ``compress-model recipes --json`` through its way in, after the statements of ``plant``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PLANTED}\n{plant}\nmain()"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_interrupted(ended: Ended, word: str = "Interrupted") -> None:
    assert ended.code == {"Interrupted": 130, "Terminated": 143}[word], ended
    assert ended.err.strip().splitlines() == [
        f"Error: {word}; run, unlearn, prune, quantize, s3t train, evaluate, export, audit and push go on "
        "where they were when given again."
    ]


CONVERTED = "commands.print_json = once(print_json, ValueError('SchemaError'))"

NOT_IMPORTED = """
class Finder:
    find_spec = staticmethod(once(lambda *_: None, ImportError("cannot be imported")))
sys.meta_path.insert(0, Finder)
"""

WHILE_IMPORTING = f"""
for name in ("compress.cli", "compress.errors"):
    sys.modules.pop(name, None)
{NOT_IMPORTED}
"""

UNWINDING = """
def thrice(*_):
    try:
        send()
    finally:
        send()
        send(signal.SIGTERM)
commands.print_json = thrice
"""

WHILE_SAYING = """
import compress.cli
def answer(error):
    send()
    return 1, "Something else."
compress.cli._answer = answer
commands.print_json = None
"""

HANGING = """
interrupts.SAME_WISH = 0.05
def hang(*_):
    threading.Timer(0.5, send).start()
    try:
        send()
    except KeyboardInterrupt:
        time.sleep(30)
commands.print_json = hang
"""

MOMENTS = {
    "a library makes an error of it": CONVERTED,
    "an import fails by it": NOT_IMPORTED,
    "the command line is being imported": WHILE_IMPORTING,
    "more signals come while it unwinds": UNWINDING,
    "another error is being answered": WHILE_SAYING,
    "the work hangs until the next signal": HANGING,
}


@pytest.mark.parametrize("plant", MOMENTS.values(), ids=MOMENTS)
def test_an_interrupt_is_answered_whatever_exception_came(plant: str):
    assert_interrupted(planted(plant))


def test_sigterm_is_answered_like_an_interrupt():
    assert_interrupted(planted("commands.print_json = lambda *_: send(signal.SIGTERM)"), "Terminated")


SHUTDOWN = {
    "atexit": "atexit.register(send)",
    "threads are joined": "threading.Thread(target=lambda: (time.sleep(3), send(), time.sleep(40))).start()",
    "the very end": "class Odd:\n"
    "    __del__ = lambda self, kill=os.kill, pid=os.getpid(), number=2: kill(pid, number)\n"
    "sys.odd = Odd()",
}


@pytest.mark.parametrize("plant", SHUTDOWN.values(), ids=SHUTDOWN)
def test_a_signal_after_the_work_changes_nothing(plant: str):
    began = time.monotonic()
    ended = planted(plant)
    assert (ended.code, ended.err) == (0, "")
    assert ended.document
    assert time.monotonic() - began < 30  # nobody waits for the thread


def test_an_interrupt_in_a_destructor_is_not_told_as_a_traceback():
    ended = planted(
        "class Odd:\n    __del__ = lambda self: send()\n"
        "commands.print_json = lambda document: (Odd(), print_json(document))"
    )
    assert (ended.code, ended.err) == (0, "")
    assert ended.document


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_work_that_goes_on_after_a_swallowed_interrupt_ends_at_the_next_progress(
    level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(level, "compress")
    with progress_shown() as progress:
        progress("working", 0.5)
        monkeypatch.setattr(interrupts._State, "received", signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("working", 0.5)


def test_the_library_leaves_signals_alone(tiny: Path, tmp_path: Path):
    before = [signal.getsignal(number) for number in interrupts.SENTENCES]
    steps = [{"method": "rtn", "group_size": 32}]
    compress.run({"model": str(tiny), "steps": steps}, tmp_path / "out")
    assert [signal.getsignal(number) for number in interrupts.SENTENCES] == before
