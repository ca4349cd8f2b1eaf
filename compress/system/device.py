"""Where to compute."""

from __future__ import annotations

import torch

from compress.errors import BadInput


def check_device(name: str) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises:
        BadInput: a tensor cannot be made there and read back.
    """
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch has another type for every way in which this fails
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BadInput(
            f"The device '{name}' cannot be used here ({reason}); 'compress-model doctor' lists the devices."
        ) from None
