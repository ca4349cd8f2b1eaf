"""Access tokens and signed addresses, which no message, log or traceback of ours may show."""

from __future__ import annotations

import logging
import re

HIDDEN = "<hidden>"

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")
"""An access token of the hub."""

_PATTERNS = (
    TOKEN,
    re.compile(r"(?<=Bearer )[^\s'\",]+"),
    re.compile(r"(?<=://)[^\s/@'\"]+:[^\s/@'\"]+(?=@)"),
    # Uploads and downloads go to addresses that are signed for a few hours.
    re.compile(
        r"(?<=[?&])((?:X-Amz-|X-Goog-|X-Xet-)?(?:Signature|Credential|Security-Token|sig))=[^&\s'\"]+"
    ),
)

_known: set[str] = set()


def remember(secret: str) -> None:
    """Hide ``secret`` from now on, whatever it looks like."""
    _known.add(secret)


def hidden(text: str) -> str:
    """``text`` without secrets: those that were remembered, and what looks like one."""
    for secret in _known:
        text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1={HIDDEN}" if pattern.groups else HIDDEN, text)
    return text


class HideSecrets(logging.Filter):
    """Hides secrets in what a handler writes, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hidden(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = hidden(record.exc_text)
        return True


def hide_in_logs() -> None:
    """Hide secrets in what this program and the hub's client log, however much they log."""
    for logger in (logging.getLogger(), logging.getLogger("huggingface_hub")):
        for handler in logger.handlers:
            if not any(isinstance(each, HideSecrets) for each in handler.filters):
                handler.addFilter(HideSecrets())
