"""How long work tells what it has done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
