"""The device under operators that kernels run on: an emulated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from compress.kernels.cuda import library
from tests.emulation.build import CUDA
from tests.emulation.emulator import Device, Kernels


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Device]]:
    """Emulates the kernels of a source under the operators, as the device that tensors are on."""
    opened: list[Device] = []

    def use(source: str) -> Device:
        device = Device(Kernels(CUDA / source)).__enter__()
        opened.append(device)
        monkeypatch.setattr(library, "library", lambda _: device.library)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4)
        )
        return device

    yield use
    for device in opened:
        device.__exit__()
