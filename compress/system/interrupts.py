"""The signals that end a command: SIGINT, which Ctrl-C sends, and SIGTERM.

Libraries written in C and Rust turn a KeyboardInterrupt into exceptions of their own, or swallow it. So the
signal is remembered, and the command line answers it whatever exception came. Only the command line calls
`watch`; a program that uses the library keeps its own handlers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

from compress.system.streams import flush_or_close

RESUMED = (
    "run, unlearn, prune, quantize, s3t train, evaluate, export, audit and push go on where they were when "
    "given again"
)

SENTENCES = {
    signal.SIGINT: f"Error: Interrupted; {RESUMED}.",
    signal.SIGTERM: f"Error: Terminated; {RESUMED}.",
}

SAME_WISH = 1.0
"""Seconds in which further signals say nothing new: while the first one unwinds the work, the others wait."""


class _State:
    watched: tuple[signal.Signals, ...] = ()
    received: signal.Signals | None = None
    when = 0.0


def watch() -> None:
    """Remember the signals from now on. What they leave behind is safe at any moment, like after a kill.

    The first signal raises KeyboardInterrupt, and is the only one that does. A signal that comes more than
    `SAME_WISH` seconds later ends the process at once, because something holds up the first one. Signals that
    are ignored already, as under nohup, stay ignored.
    """
    _State.watched = tuple(number for number in SENTENCES if signal.getsignal(number) is not signal.SIG_IGN)
    _handle_by(_on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SENTENCES)  # those that came before are answered here
    import threading

    sys.unraisablehook = _unless_received(sys.unraisablehook)
    threading.excepthook = _unless_received(threading.excepthook)
    atexit.register(_handle_by, signal.SIG_IGN)  # the first to be registered is the last to be called


def received() -> signal.Signals | None:
    """The first signal that came since `watch`."""
    return _State.received


def raise_if_received() -> None:
    """Raise KeyboardInterrupt if there was a signal that some library swallowed."""
    if _State.received is not None:
        raise KeyboardInterrupt


def end_interrupted() -> NoReturn:
    """Say that the command was interrupted, and end the process with 128 + the number of the signal."""
    number = _State.received or signal.SIGINT
    end(128 + number, SENTENCES[number])


def end(code: int, sentence: str = "") -> NoReturn:
    """Write ``sentence`` to stderr, flush everything and end the process. Signals change nothing any more."""
    _handle_by(signal.SIG_IGN)
    import logging

    with contextlib.suppress(OSError):
        if sentence and sys.stderr is not None:
            print(sentence, file=sys.stderr)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        flush_or_close(stream)
    _handle_by(lambda number, frame: os._exit(code))  # the interpreter may wait for threads before it ends
    sys.exit(code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.received is None:
        _State.received, _State.when = signal.Signals(number), time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - _State.when > SAME_WISH:
        with contextlib.suppress(OSError):
            os.write(2, f"{SENTENCES[_State.received]}\n".encode())
        os._exit(128 + _State.received)


def _handle_by(handler: Any) -> None:
    for number in _State.watched:
        signal.signal(number, handler)


def _unless_received(hook: Any) -> Any:
    """A hook that is silent after a signal: what breaks then breaks because of it."""
    return lambda details: None if _State.received is not None else hook(details)
