"""How often the host waits for the device: not for every column, window or branch.

The counts are those of the pretended device, at two sizes that differ in one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import REAL
from .pretended import pretended_cuda

pytestmark = pytest.mark.skipif(REAL, reason="a real device does not count")

ROUNDING: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"group_size": 32}),
    "gptq group by group": ("gptq", {"group_size": 32, "act_order": False, "symmetric": False}),
    "awq": ("awq", {"group_size": 32}),
    "hqq": ("hqq", {"group_size": 32}),
}

READING: dict[str, dict[str, Any]] = {
    "gptq": {},
    "awq": {},
    "flap": {"ratio": 0.3, "compensate": "bias", "width_multiple": 1},
    "blockpruner": {"blocks": 1},
}


@pytest.fixture
def waits(shared_decoder: Callable[..., Path], run_on: Any) -> Callable[..., int]:
    """How often the host waited for the device while a method was carried out on a model of some sizes."""

    def count(method: str, options: dict[str, Any], windows: int = 4, **sizes: int) -> int:
        model = shared_decoder(**{"num_hidden_layers": 1, "intermediate_size": 128} | sizes)
        with pretended_cuda() as device:
            calibration = {"nsamples": windows, "seqlen": 16}
            run_on("cuda", model, method, name=f"{windows} {sizes}", calibration=calibration, **options)
        return device.counts.waits

    return count


@pytest.mark.parametrize("name", ROUNDING)
def test_columns_do_not_wait(name: str, waits: Callable[..., int]) -> None:
    few, many = (waits(*ROUNDING[name], intermediate_size=width) for width in (96, 192))
    assert few == many


@pytest.mark.parametrize("method", ["gptq", "awq", "flap"])
def test_windows_do_not_wait(method: str, waits: Callable[..., int]) -> None:
    """All of them go through a layer in one batch."""
    few, many = (waits(method, READING[method], windows=windows) for windows in (3, 6))
    assert few == many


def test_branches_stay_on_the_device(waits: Callable[..., int]) -> None:
    """BlockPruner takes two branches for each layer through all layers behind it. If each were moved to the
    host behind every layer, the waits of three more layers would grow with the layers there are."""
    options = READING["blockpruner"]
    few, some, many = (waits("blockpruner", options, 1, num_hidden_layers=layers) for layers in (2, 5, 8))
    assert many - some < some - few + 9
