"""The Triton programs: in Triton's interpreter against float64, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from compress.errors import BadInput, CompressError
from compress.kernels import embedding_ops, ops
from compress.kernels.codes.floating import E2M1
from compress.kernels.codes.packing import pack
from compress.kernels.cpu import library as cpu_library
from compress.kernels.cuda import library as cuda
from compress.kernels.native import ABLE, NAMED, warn_once
from compress.kernels.reference import embedding
from compress.kernels.reference import ops as reference
from compress.kernels.triton import library, linear

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100, 120)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
GPU = torch.device("cuda", 0)


class Case(NamedTuple):
    """A weight [out, width] and what is multiplied with it, or the rows that are asked for."""

    bits: int
    group: int
    rows: int
    out: int = 37
    width: int = 192
    dtype: torch.dtype = torch.float16
    kind: str = "integers"  # or "symmetric", "nf4", "mxfp4", "nvfp4", "fp8"
    bias: bool = False
    activations: str = "floating"

    def weight(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Packed codes, scales, zero points and table."""
        torch.manual_seed(self.bits + self.width)
        groups = 1 if self.group == -1 else self.width // self.group
        codes = torch.randint(2**self.bits, (self.out, self.width), dtype=torch.uint8)
        scales: torch.Tensor = torch.rand(self.out, groups) + 0.5
        zeros, table = torch.randint(2**self.bits, (self.out, groups), dtype=torch.uint8), None
        if self.kind == "fp8":
            return torch.randn(self.out, self.width).to(torch.float8_e4m3fn), scales, None, None
        if self.kind in ("nf4", "mxfp4", "nvfp4"):
            table = torch.randn(16) if self.kind == "nf4" else E2M1
            stored = {"mxfp4": torch.randint(120, 130, scales.shape, dtype=torch.uint8)}
            scales = stored.get(self.kind, scales.to(torch.float8_e4m3fn) if self.kind == "nvfp4" else scales)
        scales = scales.half() if scales.dtype == torch.float32 and self.bits % 2 else scales
        return pack(codes, self.bits), scales, zeros if self.kind == "integers" else None, table

    def product(self) -> tuple[Any, ...]:
        """The arguments of `packed_linear`."""
        packed, scales, zeros, table = self.weight()
        input = torch.randn(self.rows, self.width).to(self.dtype)
        bias = torch.randn(self.out).to(self.dtype) if self.bias else None
        return (
            *(input, packed, scales, zeros, table, bias),
            *(self.bits, self.group, self.out, self.activations),
        )


CASES = [
    *(Case(bits, group, 1) for bits, group in product(range(2, 9), (32, 64, 96, -1))),
    *(Case(bits, 64, 17, 70, 448, torch.bfloat16, "symmetric", bias=True) for bits in range(2, 9)),
    *(Case(bits, -1, 1, 33, 1000, bias=True) for bits in (3, 4, 8)),  # half a tile of columns is left
    *(Case(4, 128, rows, 64, 256, torch.bfloat16) for rows in (15, 16, 33, 65)),
    *(
        Case(bits, group, rows, 40, 128, dtype, kind)
        for bits, group, kind in ((4, 64, "nf4"), (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, -1, "fp8"))
        for rows, dtype in ((1, torch.float16), (20, torch.bfloat16))
    ),
    Case(4, 32, 3, activations="int8-block"),
    Case(4, 32, 3, activations="int8-token"),
]
TABLES = [Case(bits, group, 5, 50, 320) for bits in range(2, 9) for group in (32, -1)]
NUMBERS = torch.tensor([[49, 0], [7, 7]], dtype=torch.int32)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, torch.Tensor]:
    """What the interpreter makes of all cases."""
    folder = tmp_path_factory.mktemp("triton")
    asked: list[tuple[str, tuple[Any, ...]]] = [("multiply", case.product()) for case in CASES]
    for case in TABLES:
        packed, scales, zeros, _ = case.weight()
        asked.append(("embed", (NUMBERS, packed, scales, zeros, case.bits, case.group, case.width)))
    torch.save(asked, folder / "cases")
    run("interpreted.py", folder / "cases", folder / "results", TRITON_INTERPRET="1")
    return dict(zip([*CASES, *TABLES], torch.load(folder / "results"), strict=True))


def run(script: str, *words: object, **environment: str) -> str:
    """What a script of this folder prints, in a process of its own."""
    given = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(HERE / script), *map(str, words)]
    ended = subprocess.run(command, env=given, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr
    return ended.stdout


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: Case, interpreted: dict[Case, torch.Tensor]) -> None:
    input, packed, scales, zeros, table, bias, *_ = case.product()
    if case.kind == "fp8":
        dense = packed.double() * scales.double()
    else:
        dense = reference.dequantize(packed, scales, zeros, case.bits, case.width, table).double()
    if case.activations != "floating":
        input = reference.round_to_int8(input, case.activations, case.group).to(case.dtype)
    wanted = input.double() @ dense.T + (0 if bias is None else bias.double())
    found = interpreted[case]
    assert found.dtype == case.dtype
    # Results are rounded to 11 or 8 bits, and so are the numbers of a table before they are multiplied.
    room = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[case.dtype]
    sizes = wanted.abs() + (0 if table is None else input.double().abs() @ dense.abs().T)
    assert ((found.double() - wanted).abs() <= room * sizes + 1e-4).all()


@needs_triton
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_rows_of_tables(case: Case, interpreted: dict[Case, torch.Tensor]) -> None:
    packed, scales, zeros, _ = case.weight()
    given = (NUMBERS, packed, scales, zeros, case.bits, case.group, case.out, case.width)
    assert torch.equal(interpreted[case], embedding.packed_embedding(*given))


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_ahead_of_time(architecture: int, tmp_path: Path) -> None:
    """Tensor cores, asynchronous copies, no spilled registers, and shared memory that every GPU has."""
    made = json.loads(run("ahead.py", architecture, TRITON_CACHE_DIR=str(tmp_path)))
    for name, found in made.items():
        assert found["spilled"] == 0, name
        assert found["registers"] <= 168, name  # three blocks of 128 threads fit on a multiprocessor
        assert found["shared"] <= 99 * 1024, name
        if name.startswith("linear"):
            assert found["tensor cores"] > 0, name
            assert found["asynchronous copies"] > 0, name


class Stub:
    """Stands for the programs: the operators start it, and nothing is computed."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def multiply(self, input: torch.Tensor, *given: Any) -> torch.Tensor:
        self.started.append("multiply")
        return torch.full((*input.shape[:-1], given[7]), 32, dtype=input.dtype)

    def embed(self, *_: Any) -> torch.Tensor:
        self.started.append("embed")
        return torch.zeros(1)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A pretended GPU of compute capability 9.0 without nvcc. Every sentence is still to be said."""
    stub = Stub()
    for name in ("multiply", "embed"):
        monkeypatch.setattr(linear, name, getattr(stub, name))
    no_nvcc = cuda.NotBuilt("there is no nvcc")
    monkeypatch.setattr(cuda._State, "loaded", {(9, 0): no_nvcc, (7, 5): no_nvcc})
    monkeypatch.setattr(library._State, "tried", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(library, "_try", lambda _: None)
    warn_once.cache_clear()
    yield stub
    warn_once.cache_clear()
    cpu_library.use("auto")


def failing(error: Exception) -> Callable[[torch.device], None]:
    def fail(_: torch.device) -> None:
        raise error

    return fail


def test_without_nvcc_triton_takes_over(programs: Stub, caplog: pytest.LogCaptureFixture) -> None:
    assert ops.backend_of(GPU) == "triton"
    assert caplog.messages == [
        "The CUDA kernels cannot be used here: there is no nvcc. "
        "Triton multiplies with packed weights instead."
    ]
    cpu_library.use("reference")
    assert ops.backend_of(GPU) == "reference"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError(), "it is not installed (it comes with torch for CUDA on Linux)"),
        (RuntimeError("Failed to find C compiler.\nPlease install one."), "Failed to find C compiler"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_where_triton_fails_plain_torch_goes_on(
    programs: Stub, error: Exception, reason: str, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_try", failing(error))
    assert ops.backend_of(GPU) == "reference"
    assert caplog.messages[0] == (
        f"Triton cannot be used here: {reason}. Packed layers run in plain torch on the GPU, which is slower."
    )
    with pytest.raises(CompressError, match="Triton cannot be used here"):
        cpu_library.use("triton")
    assert (cuda.wanted(), library.wanted()) == (ABLE, ABLE)  # as before


def test_an_older_gpu(programs: Stub, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(CompressError, match=r"it needs a GPU of compute capability 8.0, not 7.5"):
        cpu_library.use("triton")
    assert ops.backend_of(GPU) == "reference"


def test_asked_for_by_name(programs: Stub) -> None:
    with cpu_library.using("triton"):
        assert (cuda.wanted(), library.wanted()) == (cuda.OFF, NAMED)
        assert ops.backend_of(GPU) == "triton"
    assert (cuda.wanted(), library.wanted()) == (ABLE, ABLE)


def test_without_a_gpu() -> None:
    with pytest.raises(BadInput, match="the kernel 'triton' cannot run"):
        cpu_library.use("triton")


def test_the_operators_start_it(programs: Stub, monkeypatch) -> None:
    monkeypatch.setattr(library, "usable", lambda _: True)  # tensors lie on the CPU here
    given = Case(4, 32, 2).product()
    ops._packed_linear_cuda(*given)
    embedding_ops._packed_embedding_cuda(NUMBERS[1], *given[1:4], 4, 32, 37, 192)
    assert programs.started == ["multiply", "embed"]
    wide = given[0].float(), *given[1:]
    assert torch.equal(ops._packed_linear_cuda(*wide), reference.packed_linear(*wide))
    assert programs.started == ["multiply", "embed"]
