"""The two ways a command can end badly, each told in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CompressError(Exception):
    """The work failed (exit code 1). The message is one sentence: what is wrong and what to do."""

    exit_code = 1


class BadInput(CompressError):
    """Wrong use or bad input (exit code 2)."""

    exit_code = 2


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that does not exist, with the nearest ones that do."""
    known = sorted(known)
    if near := nearest(name, known):
        return BadInput(f"There is no {kind} '{name}'; did you mean {near}?")
    return BadInput(f"There is no {kind} '{name}'; there are: {', '.join(known) or 'none'}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names like ``name``, as ``'one' or 'another'``; empty if there is none."""
    return " or ".join(map(repr, get_close_matches(name, known, n=3, cutoff=0.5)))
