"""How long the work will take is said once its first piece is done."""

from __future__ import annotations

import logging

import pytest

from compress.system.progress import Forecast, duration


def told(caplog: pytest.LogCaptureFixture, seconds: float, share: float, start: float = 0.0) -> list[str]:
    """What is logged about work whose first piece, which ends at ``share`` of all, takes ``seconds``."""
    times = iter([100.0, 100.0 + seconds, 200.0 + seconds, 300.0 + seconds])
    passed: list[tuple[str, float]] = []
    forecast = Forecast(lambda *given: passed.append(given), "; take less", clock=lambda: next(times))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for done in (start, share, 1.0):
            forecast("pruning", done)
    assert passed == [("pruning", start), ("pruning", share), ("pruning", 1.0)]
    return [f"{record.levelname}: {record.getMessage()}" for record in caplog.records]


def test_the_first_piece_tells_the_time_of_the_whole(caplog: pytest.LogCaptureFixture):
    assert told(caplog, 100, 0.01) == ["WARNING: 'pruning' will take about 3 hours; take less."]
    assert told(caplog, 3, 0.01) == ["INFO: 'pruning' will take about 5 minutes."]
    assert told(caplog, 0.1, 0.01) == []


def test_what_was_done_before_an_interruption_does_not_count(caplog: pytest.LogCaptureFixture):
    assert told(caplog, 360, 0.51, start=0.5) == ["WARNING: 'pruning' will take about 5 hours; take less."]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(30, "1 minute"), (119, "2 minutes"), (7190, "120 minutes"), (7200, "2 hours"), (9 * 86400, "9 days")],
)
def test_times_as_one_says_them(seconds: float, text: str):
    assert duration(seconds) == text
