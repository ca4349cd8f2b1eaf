"""The wrappers of ptx.cuh, which the emulation replaces: what their text says is what the emulation does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulation.build import CUDA
from tests.emulation.emulator import SCHEDULES, Kernels
from tests.emulation.ptx import LANES, NEEDS_MEMORY, Lane, Machine, Wrapper, read

SOURCE = Path(__file__).parent / "kernels" / "instructions.cu"
WRAPPERS = {(found.name, found.parameters): found for found in read(CUDA / "ptx.cuh")}
MMA = "float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], "


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


@pytest.fixture(scope="module")
def tried() -> set[Wrapper]:
    """The wrappers that a test has tried; in the end these are all."""
    return set()


def numbers(count: int, kind: str) -> torch.Tensor:
    """Random numbers of 16 bits, two in a word."""
    dtype = torch.float16 if kind == "half" else torch.bfloat16
    return torch.randn(2 * count).to(dtype).view(torch.int32)


def unsigned(words: torch.Tensor) -> np.ndarray:
    return words.numpy().view(np.uint32)


@pytest.mark.parametrize(("kind", "tag"), [("half", "half"), ("bfloat16", "__nv_bfloat16")])
def test_tensor_cores(kernels: Kernels, tried: set[Wrapper], kind: str, tag: str) -> None:
    wrapper = WRAPPERS["mma", MMA + tag]
    tried.add(wrapper)
    a, b, d = numbers(128, kind), numbers(64, kind), torch.randn(32, 4)
    lanes: list[Lane] = [
        {"a": unsigned(a)[4 * i :], "b": unsigned(b)[2 * i :], "d": d[i].tolist()} for i in LANES
    ]
    Machine(np.zeros(0, np.uint8), 0).run(wrapper, lanes)
    kernels(f"test_multiply_{kind}", a, b, d, written=(d,))
    assert torch.allclose(
        d, torch.tensor([[float(value) for value in lane["d"]] for lane in lanes]), atol=1e-5
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_moves(kernels: Kernels, tried: set[Wrapper], schedule: str) -> None:
    words = torch.randint(-(2**31), 2**31, (32, 16)).int()
    machine = Machine(words.numpy().reshape(-1).view(np.uint8), 32 * 8 * 4)
    result = np.zeros((32, 16), np.uint32)

    def run(name: str, parameters: str, lanes: list[Lane]) -> list[Lane]:
        wrapper = WRAPPERS[name, parameters]
        tried.add(wrapper)
        machine.run(wrapper, lanes)
        return lanes

    def copies(word: int) -> list[Lane]:
        return [
            {"shared": 32 * i + 4 * word, "global": 64 * i + 4 * word, "present": i % 2 == 0} for i in LANES
        ]

    run("copy_async16", "void* shared, const void* global", copies(0))
    run("copy_async_commit", "", [{} for _ in LANES])
    run("copy_async16", "void* shared, const void* global, bool present", copies(4))
    run("copy_async_commit", "", [{} for _ in LANES])
    run("copy_async_wait", "", [{"GROUPS": 1} for _ in LANES])
    result[:, :4] = [lane["r"] for lane in run("load_matrix_x4", "uint32_t (&r)[4], const void* row", rows())]
    run("copy_async_wait", "", [{"GROUPS": 0} for _ in LANES])
    result[:, 4:8] = machine.shared.view(np.uint32).reshape(32, 8)[:, 4:]
    result[:, 8] = [lane["r"] for lane in run("load_once", "const uint32_t* p", at(1))]
    result[:, 9:11] = [lane["r"][:2] for lane in run("load_once", "const uint2* p", at(2))]
    result[:, 11:15] = [lane["r"] for lane in run("load_once", "const uint4* p", at(8))]
    three = [dict(zip("abc", map(int, unsigned(words)[i])), TABLE=0xEA) for i in LANES]
    result[:, 15] = [lane["r"] for lane in run("lop3", "uint32_t a, uint32_t b, uint32_t c", three)]

    out = torch.zeros(32, 16, dtype=torch.int32)
    kernels("test_move", words, out, written=(out,), schedule=schedule)
    assert (unsigned(out) == result).all()


def rows() -> list[Lane]:
    return [{"row": 32 * i} for i in LANES]


def at(word: int) -> list[Lane]:
    return [{"p": 64 * i + 4 * word} for i in LANES]


def test_every_wrapper_was_tried(tried: set[Wrapper]) -> None:
    if not tried:
        pytest.skip("the tests that try them did not run")
    assert {wrapper.text for wrapper in WRAPPERS.values()} == {wrapper.text for wrapper in tried}


def test_memory_is_not_moved_across_what_needs_it() -> None:
    for wrapper in WRAPPERS.values():
        if wrapper.text.startswith(NEEDS_MEMORY):
            assert wrapper.clobbers == '"memory"', wrapper.name


@pytest.mark.parametrize(
    ("right", "wrong"), [('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'), ("{%8, %9}", "{%9, %8}")]
)
def test_a_planted_bug_is_found(tmp_path: Path, kernels: Kernels, right: str, wrong: str) -> None:
    text = (CUDA / "ptx.cuh").read_text()
    assert right in text
    (tmp_path / "ptx.cuh").write_text(text.replace(right, wrong))
    wrapper = next(found for found in read(tmp_path / "ptx.cuh") if found.parameters == MMA + "half")
    a, b, d = numbers(128, "half"), numbers(64, "half"), torch.zeros(32, 4)
    lanes: list[Lane] = [
        {"a": unsigned(a)[4 * i :], "b": unsigned(b)[2 * i :], "d": [0.0] * 4} for i in LANES
    ]
    Machine(np.zeros(0, np.uint8), 0).run(wrapper, lanes)
    kernels("test_multiply_half", a, b, d, written=(d,))
    assert not torch.allclose(
        d, torch.tensor([[float(value) for value in lane["d"]] for lane in lanes]), atol=0.1
    )
