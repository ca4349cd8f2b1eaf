"""Talking to the model hub: the access token, how long to wait, and what went wrong in a few words.

The hub is the one that ``HF_ENDPOINT`` names, https://huggingface.co by default.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from compress.errors import BadInput, CompressError
from compress.system.interrupts import raise_if_received
from compress.system.secrets import hidden, hide_in_logs, remember

PATIENCE = 120.0
"""Seconds without a byte after which the hub is given up; its client alone would wait for ever."""

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def prepare() -> str | None:
    """Get the hub's client ready: limit how long it waits, and hide the access token from all logs.

    Returns:
        The access token that the user is logged in with (``HF_TOKEN``, or that of ``hf auth login``); None
        if there is none.

    Raises:
        BadInput: the token cannot be one.
    """
    from huggingface_hub import get_token, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def factory() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = hooks | {"request": [*hooks.get("request", []), _limit_waiting]}
        return client

    set_client_factory(factory)
    token = get_token()
    if token is not None:
        remember(token)
        if not re.fullmatch(r"[!-~]+", token):
            raise BadInput(f"The access token of the hub has characters that no token has; {LOG_IN}.")
    hide_in_logs()
    return token


def _limit_waiting(request: Any) -> None:
    """Give a request that would wait for ever our patience instead."""
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        which: limits.get(which) or PATIENCE for which in ("connect", "read", "write", "pool")
    }


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with; None if it did not answer."""
    for each in causes(error):
        response = getattr(each, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def is_about_the_token(error: BaseException) -> bool:
    """Whether the hub was given an access token with what it answered; its storage never is."""
    requests = [getattr(getattr(each, "response", None), "request", None) for each in causes(error)]
    return any("authorization" in request.headers for request in requests if request is not None)


@contextmanager
def errors(sentence: Callable[[Exception], CompressError]) -> Iterator[None]:
    """Turn what the hub's client raises into the error that ``sentence`` makes of it.

    Our own errors pass, and those of this machine: the disk is full, or a file cannot be used.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        # The client lets the errors of its HTTP library through, and those of reading a strange answer.
        raise_if_received()
        if _is_local(error):
            raise
        raise sentence(error) from error


def _is_local(error: BaseException) -> bool:
    return any(
        isinstance(each, OSError) and (each.errno == errno.ENOSPC or each.filename is not None)
        for each in causes(error)
    )


def answer_of(error: BaseException) -> str:
    """The hub's own words about what is wrong, in one line; empty if it has none."""
    for each in causes(error):
        if words := getattr(each, "server_message", None):
            return hidden(" ".join(str(words).split()))[:300].rstrip(".")
    return ""


def trouble(error: BaseException) -> str:
    """Why a conversation with the hub failed, as a clause that begins with "the hub" or "HF_"."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    found, status = list(causes(error)), status_of(error)
    if any(isinstance(each, OfflineModeIsEnabled) for each in found) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE forbids to ask the hub"
    if status == 401:
        return "the hub does not accept the access token"
    if status == 403 and is_about_the_token(error):
        return "the hub forbids it with this access token"
    if status == 429:
        return "the hub takes no more requests for a while (429)"
    if status is not None:
        words = answer_of(error)
        return f"the hub answered with an error ({status}{f': {words}' if words else ''})"
    # The client's errors are told by the names of their classes: releases before 2.0 raise those of httpx,
    # later ones those of httpx2.
    names = {cls.__name__ for each in found for cls in type(each).__mro__}
    if "ConnectError" in names or "ConnectTimeout" in names:
        return f"the hub cannot be reached ({constants.ENDPOINT})"
    if "TimeoutException" in names:
        return f"the hub did not answer within {PATIENCE:.0f} s"
    if {"NetworkError", "ProtocolError", "ConnectionError"} & names:
        return "the connection to the hub broke"
    words = " ".join(str(error).split()).partition(". ")[0]
    reason = f"{type(error).__name__}: {hidden(words)[:150]}".rstrip(".: ")
    if {"TransportError", "InvalidURL", "LocalEntryNotFoundError"} & names:
        return f"the hub cannot be reached ({reason})"
    return f"the hub's answer is not what was asked for ({reason})"
