"""The checks of scripts/benchmarks/gpu.py: the emulated kernels pass them, and wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any

import pytest
import torch

from compress.kernels import cache_ops, embedding_ops, ops, stack_ops
from tests.emulation.build import ROOT
from tests.emulation.emulator import Device

SCRIPTS = ROOT / "scripts" / "benchmarks"
SOURCES = {
    "kv_quantize, kv_attention": "cache.cu",
    "packed_linear: NF4, MXFP4, NVFP4, E4M3": "formats.cu",
    "plane_linear, factor_linear": "stacks.cu",
}
SKIPPED = ("packed_linear: layers of 1 B to 70 B",)  # an emulation of these takes hours


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = import_module("gpu")
    monkeypatch.setattr(script, "LONGEST", 200)
    torch.manual_seed(0)
    return script


def emulated() -> Any:
    """What the operators do on a CUDA device."""
    return import_module("gpu_checks").Operators(
        packed_linear=ops._packed_linear_cuda,
        packed_embedding=embedding_ops._packed_embedding_cuda,
        kv_quantize=cache_ops._kv_quantize_cuda,
        kv_attention=cache_ops._kv_attention_cuda,
        plane_linear=stack_ops._plane_linear_cuda,
        factor_linear=stack_ops._factor_linear_cuda,
    )


def rows(script: ModuleType) -> dict[str, Callable[..., object]]:
    """The checks of the CUDA kernels; Triton's programs are not emulated."""
    kinds = script.kinds_of_checks()
    return {name: cases for kind in kinds if kind != "triton" for name, cases in kinds[kind].items()}


def some(cases: Iterator[object], step: int) -> Iterator[object]:
    return islice(cases, 0, None, step)


def test_the_emulated_kernels_pass(gpu: ModuleType, emulate: Callable[[str], Device]) -> None:
    checks = import_module("gpu_checks")
    for name, cases in rows(gpu).items():
        if name in SKIPPED:
            continue
        emulate(SOURCES.get(name, "linear.cu"))
        with gpu.only_kernels(emulated(), "cuda") as operators:
            listed = (case for case in cases(operators, "cpu") if "4096" not in case.name)
            found = checks.summary(some(listed, 3), lambda: False)
        assert found["facts"] == {"result": "agrees with float64"}, name
        assert found["figures"]["calls"]["value"] > 5
        assert found["figures"]["worst"]["value"] <= 1


def test_an_operator_that_no_kernel_answers_is_an_error(gpu: ModuleType) -> None:
    cases = rows(gpu)["packed_embedding"]
    with (
        gpu.only_kernels(import_module("gpu_checks").Operators(), "cuda") as operators,
        pytest.raises(RuntimeError, match="plain torch"),
    ):
        next(iter(cases(operators, "cpu"))).worst()


@pytest.mark.parametrize("wrong", ["nothing", "a column is left out", "NaN"])
def test_what_is_wrong_is_found(gpu: ModuleType, wrong: str) -> None:
    checks = import_module("gpu_checks")

    def product(input: torch.Tensor, *rest: object) -> torch.Tensor:
        if wrong == "a column is left out":
            input = input.clone()
            input[:, -1] = 0
        found = ops.packed_linear(input, *rest)
        return found * torch.nan if wrong == "NaN" else found

    operators = checks.Operators(packed_linear=product)
    found = checks.summary(checks.every_row(operators, "cpu"), lambda: False)
    if wrong == "nothing":
        assert found["facts"] == {"result": "agrees with float64"}
    else:
        assert found["facts"]["failed"].startswith("69 of 69 calls are wrong: 48x384, 4 bits, 1 rows")


def test_without_time_calls_are_left_out_and_said_so(gpu: ModuleType) -> None:
    checks = import_module("gpu_checks")
    found = checks.summary(checks.every_row(checks.Operators(), "cpu"), lambda: True)
    assert found["facts"]["failed"] == "69 calls were left out, because the time was up"
