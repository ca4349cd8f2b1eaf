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


def total_memory(device: str) -> int:
    """The bytes of memory that a device has of its own; 0 for the CPU, which computes in that of the host."""
    return torch.cuda.mem_get_info(device)[1] if torch.device(device).type == "cuda" else 0
