from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from compress.evaluation import timed
from compress.evaluation.measure import energy, measured
from compress.evaluation.timed import Timed
from compress.system.energy import EnergyMeter


def zone(folder: Path, number: str, name: str, microjoules: int, largest: int = 10**6) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (path / file).write_text(f"{value}\n")
    return path


def test_packages_and_memory_are_added(tmp_path: Path):
    package, memory = zone(tmp_path, "0", "package-0", 500), zone(tmp_path, "0:2", "dram", 10)
    zone(tmp_path, "0:0", "core", 400)  # a part of the package
    zone(tmp_path, "1", "psys", 7)  # the package is a part of it
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    assert before == [500, 10]
    (package / "energy_uj").write_text("2500000")
    (memory / "energy_uj").write_text("500010")
    assert meter.since(before) == pytest.approx(2.9995)


def test_a_counter_that_starts_again_has_gone_on(tmp_path: Path):
    package = zone(tmp_path, "0", "package-0", 900_000, largest=1_000_000)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("200000")
    assert meter.since(before) == pytest.approx(0.3)


def test_a_machine_that_does_not_tell(tmp_path: Path):
    meter = EnergyMeter(tmp_path / "none")
    assert meter.read() == []
    assert meter.since([]) is None
    hidden = zone(tmp_path, "0", "package-0", 5)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    (hidden / "energy_uj").unlink()
    (hidden / "energy_uj").mkdir()  # cannot be read, by root neither
    assert meter.since(before) is None


def test_energy_has_a_spread_or_is_not_shown():
    assert energy([0.5, 0.4]) is None
    figure = energy([0.5, 0.4, 0.6])
    assert (figure.value, figure.low, figure.high) == (0.5, 0.45, 0.55)
    assert str(figure) == "0.500 (0.450–0.550) J/token"


def test_a_decode_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each token costs a joule, and reading the prompt one, which does not count."""
    package = zone(tmp_path, "0", "package-0", 0, largest=10**12)
    monkeypatch.setattr(timed, "EnergyMeter", lambda: EnergyMeter(tmp_path))
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)

    def burn(*_: object) -> None:
        (package / "energy_uj").write_text(str(int((package / "energy_uj").read_text()) + 10**6))

    model.register_forward_hook(burn)
    torch.set_num_threads(1)
    found = measured(Timed(lambda: model), prefill_tokens=4, decode_tokens=5, repetitions=3)
    assert found.decode_energy.value == 1
    assert found.decode_energy.low == found.decode_energy.high == 1
