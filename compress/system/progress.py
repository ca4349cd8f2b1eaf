"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""A function that is called repeatedly with a text that says what is being done and the share of it that is
done, from 0 to 1."""
