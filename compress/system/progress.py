"""How long-running work reports its progress, and how long it will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""A function that is called repeatedly with a text that says what is being done and the share of it that is
done, from 0 to 1."""

MINUTE, HOUR, DAY = 60, 3600, 86400
"""In seconds."""


class Forecast:
    """Passes progress on, and says how long a part of the work takes once its first piece is done.

    What takes more than an hour is a warning, and what takes more than a minute is for the information of
    those who want to know.

    Args:
        progress: where progress is passed on to.
        advice: the end of the warning's sentence, which says what takes less time.
        clock: tells the time in seconds.
    """

    def __init__(
        self, progress: Progress, advice: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.progress, self.advice, self.clock = progress, advice, clock
        self.begun: dict[str, tuple[float, float]] = {}
        self.told: set[str] = set()

    def __call__(self, text: str, share: float) -> None:
        now = self.clock()
        began, already = self.begun.setdefault(text, (now, share))
        if text not in self.told and share > already:
            self.told.add(text)
            self._tell(text, (now - began) / (share - already) * (1 - already))
        self.progress(text, share)

    def _tell(self, text: str, seconds: float) -> None:
        if seconds > HOUR:
            log.warning("'%s' will take about %s%s.", text, duration(seconds), self.advice)
        elif seconds > MINUTE:
            log.info("'%s' will take about %s.", text, duration(seconds))


def duration(seconds: float) -> str:
    """A time as one says it, such as "3 hours"."""
    for unit, length in (("day", DAY), ("hour", HOUR), ("minute", MINUTE)):
        if seconds >= 2 * length or unit == "minute":
            count = max(1, round(seconds / length))
            return f"{count} {unit}{'s' if count > 1 else ''}"
    raise AssertionError("every time is some minutes")
