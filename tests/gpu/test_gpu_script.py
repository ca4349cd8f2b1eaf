"""scripts/benchmarks/gpu.py on a pretended device: its parts run there, and a failure is a row."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "benchmarks"
TINY = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, which keeps its results in a folder of the test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, common, records = map(import_module, ("gpu", "common", "records"))
    (tmp_path / "gpu.json").write_text((SCRIPTS / "results" / "gpu.json").read_text())
    for module in (script, common, records):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(script, "where", lambda: "pretended")
    monkeypatch.setattr(script, "STARTED", time.monotonic())
    return script


def arguments(tmp_path: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(results="gpu", folder=tmp_path / "work", **more)


def called(calls: Sequence[Callable[[], object]]) -> float:
    """Stands in for CUDA graphs: carries the calls out, and takes a microsecond for each."""
    for call in calls:
        call()
    return 1e-6


def test_every_shape_is_timed(gpu: ModuleType, cuda: Any) -> None:
    times = import_module("gpu_times")
    with cuda():
        bandwidth = times.copy_bandwidth("cuda", called, 1 << 10)
        found = times.shape_figures(64, 256, (1, 3), bandwidth, "cuda", called, 1 << 17)
    assert bandwidth == 2 * 1024 / 1e-6
    assert list(found) == [1, 3]
    figures = found[3]["figures"]
    assert figures["int4_time"]["value"] == 1.0
    assert figures["int2_ratio"]["value"] == 1.0
    # 64 rows of 128 bytes and two scales; three rows of input and output, of 2 bytes each.
    least = 64 * (128 + 4) + 2 * 3 * (64 + 256)
    assert figures["int4_share"]["value"] == pytest.approx(least / 2048)
    assert "failed" in found[1]["facts"]  # torch's own product for 4 bits is one for GPUs


def test_a_step_waits_for_nothing_and_can_be_a_graph(gpu: ModuleType, cuda: Any) -> None:
    decode = import_module("gpu_decode")
    chosen = []

    def captured(step: Callable[[], None]) -> Callable[[], None]:
        device.counts.reset()
        step()
        assert (device.counts.waits, device.counts.to_device) == (0, 0)
        return step

    with cuda() as device:
        for bits in (16, 4):
            model = decode.random_llama(TINY, 2, "cuda")
            if bits < 16:
                decode.pack_linears(model, bits)
            for graph in (False, True):
                seconds, tokens = decode.decoded(model, "cuda", graph, 5, captured)
                assert seconds > 0
                chosen.append(tokens)
        packed = decode.token_bytes(model)
    assert chosen[0] == chosen[1]
    assert chosen[2] == chosen[3]
    assert packed < 2 * (2 * (128 * 128 * 4 + 3 * 128 * 256) + 96 * 128) / 2


def test_decoding_in_fixed_memory_is_decoding(gpu: ModuleType) -> None:
    decode = import_module("gpu_decode")
    model = decode.random_llama(TINY, 2, "cpu").float()
    _, tokens = decode.decoded(model, "cpu", False, 6)
    prompt = torch.randint(96, (1, decode.PROMPT), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, decode.PROMPT :]
    assert tokens == wanted.tolist()


def test_a_part_that_fails_is_a_row(gpu: ModuleType, tmp_path: Path) -> None:
    bench = gpu.Bench(arguments(tmp_path), 60)

    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    bench.row("broken", broken)
    bench.row("right", lambda: {"facts": {"result": "done"}})
    first, second = bench.sheet.rows
    assert first.facts == {"failed": "CUDA error: an illegal memory access was encountered"}
    assert second.facts == {"result": "done"}
    assert first.machine == "pretended"
    with pytest.raises(RuntimeError, match="no bandwidth"):
        bench.bandwidth()


def test_without_time_rows_are_left_out(gpu: ModuleType, tmp_path: Path, cuda: Any) -> None:
    bench = gpu.Bench(arguments(tmp_path), 0)
    bench.row("copy", lambda: {"figures": {"bandwidth": {"value": 1.0}}})
    gpu.times(bench)
    rows = bench.sheet.rows[1:]
    assert rows[0].name == "4096x14336 (8 B), 1 row"
    assert len(rows) == 9 * 7
    assert {row.facts["failed"] for row in rows} == {"left out, because the time was up"}


@pytest.mark.parametrize("fault", ["import os; os.abort()", "import time; time.sleep(60)"])
def test_a_process_that_dies_or_hangs_is_a_row(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, capfd: Any
) -> None:
    (tmp_path / "fault.py").write_text(fault)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "fault.py"))
    monkeypatch.setattr(gpu, "PARTS", {"first": gpu.Part(3, print), "second": gpu.Part(3, print)})
    assert gpu.run_all(arguments(tmp_path, parts=["first", "second"])) == 1
    records = import_module("records").Results.read(tmp_path / "gpu.json").records
    assert [record.name for record in records] == ["part first", "part second"]
    assert "ended" in records[0].facts["failed"]
    assert "part second" in capfd.readouterr().out


def test_a_command_that_fails_is_a_row(gpu: ModuleType, tmp_path: Path) -> None:
    bench = gpu.Bench(arguments(tmp_path), 60)
    found = gpu.commanded(bench, ("inspect", tmp_path / "nothing"))
    assert "nothing" in found["facts"]["failed"]


def test_its_time_is_below_eight_minutes(gpu: ModuleType) -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) < 8 * 60
    assert "4096x14336 (8 B)" in gpu.listing()


def test_without_a_gpu_it_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = subprocess.run([sys.executable, SCRIPTS / "gpu.py"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "There is no CUDA device here that torch can use, and gpu.py measures nothing but that.\n"
    )
