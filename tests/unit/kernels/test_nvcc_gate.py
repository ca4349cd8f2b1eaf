"""The gate that CUDA kernels pass without a GPU: scripts/benchmarks/nvcc_gate.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "tests" / "emulation" / "kernels" / "instructions.cu"


@pytest.fixture(scope="module")
def gate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
        yield import_module("nvcc_gate")


def test_what_is_wrong_with_a_kernel_is_said(gate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.EXPECTED, "gemm", ("HMMA",))
    good = gate.Kernel("gemm", "gemm<4>", registers=168, found=Counter(HMMA=1))
    assert gate.faults([good]) == []
    for change, sentence in (
        ({"spilled": 8}, "gemm<4> spills 8 bytes"),
        ({"registers": 169}, "gemm<4> has 169 registers, above 168"),
        ({"found": Counter()}, "gemm<4> has no HMMA"),
    ):
        bad = gate.Kernel(**{**vars(good), **change})
        assert gate.faults([bad]) == [sentence]


def test_names_are_readable(gate: ModuleType) -> None:
    symbol = "_ZN8compress40_GLOBAL__N__b2965a4c_8_cache_cu_5f76377c6attendILi8ELi4EEEvNS_9AttentionE"
    assert gate.readable([symbol]) == {symbol: "attend<8, 4>"}


def test_instructions_are_found_in_what_is_compiled(gate: ModuleType) -> None:
    nvcc, nvdisasm = gate.find_program("nvcc"), gate.disassembler()
    if nvcc is None:
        pytest.skip("there is no nvcc, so CUDA kernels are not compiled")
    kernels = {kernel.name: kernel for kernel in gate.compiled(nvcc, nvdisasm, SOURCE, "80")}
    assert set(kernels) == {"multiply_half", "multiply_bfloat16", "move"}
    assert gate.faults(kernels.values()) == []
    assert kernels["move"].shared == 32 * 8 * 4
    if nvdisasm is None:
        pytest.skip("there is no nvdisasm, so machine code is not read")
    assert kernels["multiply_half"].found["HMMA"] == kernels["multiply_bfloat16"].found["HMMA"] == 1
    assert kernels["move"].found["LDGSTS"] == 2
    assert kernels["move"].found["LDG.128"] >= 1


def test_a_spill_is_seen(gate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = gate.find_program("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc, so CUDA kernels are not compiled")
    (tmp_path / "many.cu").write_text(
        "__global__ void many(float* x) { float v[64];\n#pragma unroll\n"
        "for (int i = 0; i < 64; i++) v[i] = x[i];\n__syncthreads();\n#pragma unroll\n"
        "for (int i = 0; i < 64; i++) x[63 - i] = v[i] * v[(i * 7) % 64]; }\n"
    )
    monkeypatch.setattr(gate, "FLAGS", (*gate.FLAGS, "-maxrregcount", "24"))
    (kernel,) = gate.compiled(nvcc, None, tmp_path / "many.cu", "80")
    assert kernel.spilled > 0
    assert "spills" in gate.faults([kernel], disassembled=False)[0]
