"""What ``compress-model doctor`` says about the native kernels of the CPU."""

from __future__ import annotations

import pytest
import torch

from compress.commands import doctor
from compress.errors import CompressError
from compress.kernels.cpu import build, library, processor, trial
from compress.kernels.reference import ops as reference
from .common import Command


def test_it_shows_what_can_run_and_what_does(command: Command):
    shown = command("doctor", "--json").document["CPU kernels"]
    for path in library.paths():
        assert shown[f"path {path}"] == "can run"
    assert shown["in use"] == library.kernel_name()
    assert shown["C++ compiler"] == build.compiler_version() or "none found"


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
def test_build_tries_every_path(command: Command):
    shown = command("doctor", "--build", "--json").document["CPU kernels"]
    for path in library.paths():
        assert shown[f"path {path}"] == "compiled; its results are right"


def test_wrong_results_are_told_and_end_with_an_error(command: Command, monkeypatch):
    def wrong(*arguments: object) -> torch.Tensor:
        return reference.packed_linear(*arguments) * 1.001

    monkeypatch.setattr(trial, "use", lambda name: None)
    monkeypatch.setattr(trial, "packed_linear", wrong)
    ended = command("doctor", "--build", "--json")
    assert ended.code == 1
    assert ended.document["CPU kernels"]["path portable"].startswith("fails: ")
    assert "multiply wrongly here (2 bits, torch.float32, 1 rows" in ended.err


def test_a_path_that_cannot_be_compiled(monkeypatch):
    def fail(name: str) -> None:
        if name != "auto":
            raise CompressError("No.")

    monkeypatch.setattr(trial, "use", fail)
    assert doctor.cpu_kernels(build=True)["path portable"] == "fails: No."


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"avx2", "avx512_bf16"}, "fast: "),
        ({"asimd", "bf16"}, "fast: "),
        ({"avx2", "fma"}, "slow: "),
        (set(), "not known"),
    ],
)
def test_slow_bfloat16_is_told(monkeypatch, features, said):
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    monkeypatch.setattr(processor.sys, "platform", "linux")
    assert doctor.BFLOAT16[processor.multiplies_bfloat16()].startswith(said)
