"""The devices to compute on."""

from __future__ import annotations

import torch

from compress.errors import BadInput


def check_device(name: str) -> None:
    """Make sure that this machine and this build of torch have a device.

    Raises:
        BadInput: a tensor cannot be created there and read back.
    """
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises many different types here
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BadInput(
            f"The device '{name}' cannot be used here ({reason}); 'compress-model doctor' lists the devices."
        ) from None
