"""What else a device changes: its memory, the precision of its products, and runs that go on after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.engine import activations
from compress.errors import CompressError
from compress.quantization.parts import distillation
from compress.storage.lineage import read_lineage

from .common import assert_same_model
from .conftest import REAL


def test_the_peak_of_the_device_goes_into_the_lineage(
    shared_decoder: Callable[..., Path], run_on: Any, cuda: Any
) -> None:
    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    folder, here = run_on("cpu", model, "rtn")
    assert here.steps[0].peak_device_memory_bytes is None
    assert "memory" not in (folder / "README.md").read_text()
    with cuda():
        folder, there = run_on("cuda", model, "rtn")
    peak = there.steps[0].peak_device_memory_bytes
    assert peak is not None
    assert peak > 0
    assert read_lineage(folder) == there
    assert f"{peak / 1e6:.1f} MB of the device's memory" in (folder / "README.md").read_text()


def test_the_peak_is_that_of_one_step(shared_decoder: Callable[..., Path], cuda: Any, tmp_path: Path) -> None:
    """The step that holds the text on the device takes more than the one before and the one after it."""
    model = shared_decoder(num_hidden_layers=3, intermediate_size=128)
    calibration = {"source": str(model.parent / "text.txt"), "nsamples": 32, "seqlen": 64}
    steps = [
        {"method": "magnitude", "ratio": 0.1},
        {"method": "shortgpt", "layers": 1},
        {"method": "rtn", "group_size": "channel"},
    ]
    with cuda():
        lineage = compress.run(
            {"model": str(model), "calibration": calibration, "steps": steps}, tmp_path / "out", device="cuda"
        )
    before, middle, after = (step.peak_device_memory_bytes or 0 for step in lineage.steps)
    assert middle > before > 0
    assert middle > after > 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "flap"])
def test_a_walk_holds_one_layer_on_the_device(
    method: str, shared_decoder: Callable[..., Path], run_on: Any, cuda: Any
) -> None:
    peaks, options = [], {"ratio": 0.3} if method == "flap" else {}
    for layers in (2, 6):
        model = shared_decoder(num_hidden_layers=layers, intermediate_size=128)
        with cuda():
            _, lineage = run_on("cuda", model, method, **options)
        peaks.append(lineage.steps[0].peak_device_memory_bytes)
    assert peaks[1] < 1.1 * peaks[0]


def test_hidden_states_beyond_the_share_of_a_device_give_the_same(
    shared_decoder: Callable[..., Path], run_on: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held in the memory of the host then, or in files."""
    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    hashes = []
    with cuda():
        for share, limit in ((1 / 16, 1 << 30), (0, 1 << 30), (0, 0)):
            monkeypatch.setattr(activations, "DEVICE_SHARE", share)
            monkeypatch.setattr(activations, "MEMORY_LIMIT", limit)
            folder, _ = run_on("cuda", model, "gptq")
            hashes.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    assert len(set(hashes)) == 1


def test_too_little_memory_is_one_sentence(
    shared_decoder: Callable[..., Path], run_on: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    with cuda() as device:
        if REAL:
            monkeypatch.setattr(torch.Tensor, "to", _no_memory)
        else:
            device.memory.limit = 100_000
        with pytest.raises(CompressError, match=r"^The device 'cuda' has too little memory for this; .*\.$"):
            run_on("cuda", model, "rtn")


def _no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_products_are_exact_during_a_run(shared_decoder: Callable[..., Path], run_on: Any, cuda: Any) -> None:
    """Also where the program around it allows TF32, which comes back afterwards."""
    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    _, expected = run_on("cpu", model, "gptq")
    torch.set_float32_matmul_precision("high")
    try:
        with cuda():
            _, found = run_on("cuda", model, "gptq")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = [lineage.steps[0].details["relative_error"]["mean"] for lineage in (expected, found)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_precision_inside(shared_decoder: Callable[..., Path], run_on: Any) -> None:
    seen = []

    def progress(*_: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())

    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    torch.set_float32_matmul_precision("medium")
    try:
        run_on("cpu", model, "rtn", progress=progress)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("method", ["gptq", "llm-qat", "replaceme", "kprune"])
def test_a_killed_run_goes_on(
    method: str,
    shared_decoder: Callable[..., Path],
    run_on: Any,
    cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was saved comes back from the host to the device."""
    options: dict[str, dict[str, Any]] = {
        "llm-qat": {"steps": 3, "batch_size": 2},
        "replaceme": {"layers": 1, "transform": "least-squares", "l2": 1.0},
        "kprune": {"ratio": 0.3},
    }
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    model = shared_decoder(num_hidden_layers=3, intermediate_size=128)
    chosen = options.get(method, {})
    results = []

    def kill(text: str, share: float) -> None:
        if text == {"llm-qat": "training"}.get(method, text) and 0.5 < share < 1:
            raise KeyboardInterrupt

    with cuda():
        for killed in (False, True):
            if killed:
                with pytest.raises(KeyboardInterrupt):
                    run_on("cuda", model, method, name="killed", progress=kill, **chosen)
            name = "killed" if killed else "whole"
            results.append(run_on("cuda", model, method, name=name, **chosen))
    assert [lineage.steps[0].resumed for _, lineage in results] == [False, True]
    assert_same_model(*results, learned=method == "llm-qat")
