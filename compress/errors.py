"""The kinds of errors that a command reports, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CompressError(Exception):
    """The work failed (exit code 1). The message is one sentence: what is wrong, and what to do about it."""

    exit_code = 1


class BadInput(CompressError):
    """The command was used wrongly, or its input is bad (exit code 2)."""

    exit_code = 2


class DamagedWork(CompressError):
    """What an interrupted command kept is damaged, so that nothing can go on from it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that does not exist. It suggests similar names that do."""
    known = sorted(known)
    if near := nearest(name, known):
        return BadInput(f"There is no {kind} '{name}'; did you mean {near}?")
    return BadInput(f"There is no {kind} '{name}'; there are: {', '.join(known) or 'none'}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that resemble ``name``, as ``'one' or 'another'``; empty if there are none."""
    return " or ".join(map(repr, get_close_matches(name, known, n=3, cutoff=0.5)))
