"""Standard streams that cannot show every character, or whose reader has gone."""

from __future__ import annotations

import codecs
import io
import os
from typing import IO

PLAIN = {"−": "-", "–": "-", "—": "-", "×": "x", "÷": "/", "±": "~", "‖": "|", "…": ".", "’": "'"}
"""Characters of our tables, and what stands for them where they cannot be shown, equally wide."""

REPLACED = "compress-model.plain"


def show_what_can_be_shown(stream: IO[str] | None) -> None:
    """Let ``stream`` replace the characters that its encoding lacks, instead of refusing the whole text."""
    codecs.register_error(REPLACED, _replaced)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=REPLACED)


def flush_or_close(stream: IO[str] | None) -> None:
    """Flush ``stream``, or close it if that fails, because its reader has gone or its disk is full.

    The interpreter flushes again at its end, and then has nothing to complain about.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in unknown), error.end
