"""The devices to compute on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from compress.errors import BadInput, CompressError

if TYPE_CHECKING:
    from transformers import TrainingArguments


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
    """The bytes of memory that a device has of its own; 0 for the CPU."""
    return torch.cuda.mem_get_info(device)[1] if has_own_memory(device) else 0


def has_own_memory(device: str) -> bool:
    """Whether tensors on the device take memory of its own."""
    return torch.device(device).type == "cuda"


def reset_peak_device_memory(device: str) -> None:
    """Make `peak_device_memory` count from now on."""
    if has_own_memory(device):
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory(device: str) -> int | None:
    """The most bytes that this process's tensors took of the device's own memory; None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if has_own_memory(device) else None


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """Compute on a device for the length of a ``with`` block.

    Inside, products of float32 matrices are float32, because statistics are made of them, even where the
    program around this one has allowed their factors to be rounded (TF32 on a GPU, bfloat16 on a CPU).

    Raises:
        CompressError: the device has too little memory.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except torch.OutOfMemoryError:
        raise CompressError(
            f"The device '{device}' has too little memory for this; use fewer or shorter windows, or another "
            "device (--device cpu)."
        ) from None
    finally:
        torch.set_float32_matmul_precision(precision)


def train_on(device: str, arguments: TrainingArguments) -> None:
    """Let the Trainer of transformers compute on this device alone; by itself it takes all GPUs it finds."""
    arguments.distributed_state.device = torch.device(device)
    arguments.__dict__["_setup_devices"] = torch.device(device)
    arguments._n_gpu = min(1, arguments._n_gpu)
