"""The arithmetic of scripts/benchmarks/roofline.py, by hand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "benchmarks"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("roofline")


def test_the_bytes_of_a_weight(roofline: ModuleType) -> None:
    layout = roofline.Layout(4, 128, scale=2, zero=1)
    assert layout.weight_bytes(10, 256) == 10 * (128 + 2 * 3)
    assert roofline.Layout(3, -1).weight_bytes(1, 33) == 4 * 4 + 2  # 99 bits are four words
    assert roofline.DENSE.weight_bytes(10, 256) == 2 * 10 * 256


def test_the_longer_of_two_times(roofline: ModuleType) -> None:
    gpu = roofline.Gpu("one GB/s, one TFLOP/s", 1e9, 1e12)
    dense, _ = roofline.least_seconds(gpu, roofline.DENSE, 1000, 1000, 1)
    assert dense == pytest.approx((2e6 + 2 * 2000) / 1e9)
    seconds, limit = roofline.least_seconds(gpu, roofline.DENSE, 1000, 1000, 10_000)
    assert (seconds, limit) == (pytest.approx((2e6 + 2 * 10_000 * 2000) / 1e9), "memory")
    seconds, limit = roofline.least_seconds(roofline.Gpu("slow", 1e12, 1e9), roofline.DENSE, 1000, 1000, 10)
    assert (seconds, limit) == (pytest.approx(2e7 / 1e9), "tensor cores")


def test_one_row_is_as_fast_as_its_bytes_are_few(roofline: ModuleType) -> None:
    for gpu in roofline.GPUS:
        four, two = (roofline.on_paper(gpu, bits, 4096, 14336)["figures"] for bits in (4, 2))
        assert four["ratio_1"]["value"] == pytest.approx(16 / (4 + 16 / 128), rel=0.01)
        assert two["ratio_1"]["value"] == pytest.approx(16 / (2 + 16 / 128), rel=0.01)
        assert two["time_64"]["value"] <= four["time_64"]["value"]
