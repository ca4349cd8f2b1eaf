"""Whether Triton multiplies on a GPU: where it was asked for, or where the CUDA kernels cannot be had.

Triton comes with torch for CUDA on Linux. Whether it works shows only when it compiles something (it needs a
C compiler, a driver and a cache that can be written), so a small product is tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

import torch

from compress.errors import BadInput, CompressError
from compress.kernels.native import ABLE, NAMED, OFF, NotBuilt, warn_once

TRITON = "triton"

OLDEST = (8, 0)
"""The oldest compute capability whose tensor cores take bfloat16."""


class _State:
    lock = RLock()
    wanted = ABLE
    tried: dict[torch.device, NotBuilt | None] = {}  # noqa: RUF012


def wanted() -> int:
    """One of `OFF`, `ABLE` and `NAMED`."""
    return _State.wanted


def want(how: int) -> None:
    """Set what `wanted` gives, in this process from now on.

    Raises:
        BadInput: Triton is asked for by name, but there is no CUDA device.
        CompressError: Triton is asked for by name, but does not work.
    """
    if how == NAMED:
        if not torch.cuda.is_available():
            raise BadInput(
                "There is no CUDA device here that torch can use, so the kernel 'triton' cannot run."
            )
        check(torch.device("cuda", torch.cuda.current_device()))
    _State.wanted = how


def check(device: torch.device) -> None:
    """Try Triton on a device, once in a process.

    Raises:
        CompressError: it does not work there.
    """
    with _State.lock:
        if device not in _State.tried:
            _State.tried[device] = _tried(device)
        reason = _State.tried[device]
    if reason is not None:
        raise CompressError(f"Triton cannot be used here: {reason}.")


def usable(device: torch.device) -> bool:
    """Whether Triton multiplies on a device.

    Raises:
        CompressError: it was asked for by name and does not work.
    """
    if _State.wanted == OFF or device.type != "cuda" or not torch.cuda.is_available():
        return False
    try:
        check(device)
    except CompressError as error:
        if _State.wanted == NAMED:
            raise
        warn_once(f"{error} Packed layers run in plain torch on the GPU, which is slower.")
        return False
    return True


def start(device: torch.device, call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The result of a call that starts programs on a device; None if plain torch is to compute it.

    Raises:
        CompressError: Triton was asked for by name and does not work.
    """
    if not usable(device):
        return None
    with torch.cuda.device(device):  # where Triton starts them
        return call()


def _tried(device: torch.device) -> NotBuilt | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return NotBuilt("it needs a GPU of compute capability 8.0, not {}.{}".format(*capability))
    try:
        with torch.cuda.device(device):
            _try(device)
    except ImportError:
        return NotBuilt("it is not installed (it comes with torch for CUDA on Linux)")
    except Exception as error:  # whatever its compiler, the C compiler or the driver met
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return NotBuilt(lines[0].rstrip("."))
    return None


def _try(device: torch.device) -> None:
    """Multiply one row with a small weight of zeros, whose codes stand for 1."""
    from compress.kernels.triton.linear import multiply

    input = torch.ones(1, 32, dtype=torch.float16, device=device)
    packed = torch.zeros(1, 4, dtype=torch.int32, device=device)
    scales = torch.full((1, 1), -1 / 8, dtype=torch.float16, device=device)
    found = multiply(input, packed, scales, None, None, None, 4, 32, 1, "floating").item()
    if found != 32:
        raise NotBuilt(f"it multiplies wrongly (32 is {found:g})")
