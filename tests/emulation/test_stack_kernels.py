"""plane_linear and factor_linear of ``source/stacks.cu`` against the reference, emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.kernels import stack_ops
from compress.kernels.codes.packing import pack_signs
from compress.kernels.cuda import stacks
from compress.kernels.reference import stacks as reference
from tests.emulation.build import CUDA
from tests.emulation.emulator import FEWER, SCHEDULES, Device, EmulationError, Kernels
from tests.emulation.test_linear_kernels import HALVES, INPUTS

SOURCE = CUDA / "stacks.cu"
SHAPES = ((16, 128, 4), (33, 160, 5), (7, 256, 2), (40, 77, 1), (1, 1152, 9), (17, 96, 3))
"""Rows of the weight, columns, and groups of nested codes."""

RANKS = (16, 1, 5, 16, 20, 33)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


def signs(*shape: int) -> torch.Tensor:
    return pack_signs(torch.rand(shape) < 0.5)


def nested(blocks: int, out: int, width: int, groups: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    planes = [signs(2, out, width), *(signs(out, width) for _ in range(blocks - 1))]
    return planes, (torch.rand(out, groups) + 0.5).div(width**0.5).half()


def factors(blocks: int, out: int, width: int, rank: int) -> tuple[list[torch.Tensor], ...]:
    size = (width * rank) ** -0.5
    return (
        [signs(out, width) for _ in range(blocks)],
        [torch.randn(out, rank).half() for _ in range(blocks)],
        [(torch.randn(rank, width) * size * 2.0**-i).half() for i in range(blocks)],
    )


def compared(found: torch.Tensor, error: int, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Make sure that a product is that of the reference in float32 but for the rounding of ``dtype``."""
    assert error == 0
    assert found.dtype == dtype
    assert found.shape == exact.shape
    limit = (2e-3 if dtype == torch.float16 else 1.6e-2) * float(exact.abs().max())
    assert float((found.float() - exact).abs().max()) <= limit


def check_planes(kernels: Kernels, input: torch.Tensor, given: Any, bias: Any, **setting: Any) -> Device:
    activations = setting.pop("activations", "floating")
    with Device(kernels, [input, *given[0], given[1]], **setting) as device:
        found = stacks.multiply_planes(device.library, input, *given, bias, activations, None)
    wide = None if bias is None else bias.float()
    compared(*found, reference.plane_linear(input.float(), *given, wide, activations), input.dtype)
    return device


def check_factors(kernels: Kernels, input: torch.Tensor, given: Any, bias: Any, **setting: Any) -> Device:
    inputs = [input, *(tensor for part in given for tensor in part)]
    with Device(kernels, inputs, **setting) as device:
        found = stacks.multiply_factors(device.library, input, *given, bias, None)
    wide = None if bias is None else bias.float()
    compared(*found, reference.factor_linear(input.float(), *given, wide), input.dtype)
    return device


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blocks", range(1, 8))
def test_nested_codes_are_those_of_the_reference(kernels: Kernels, blocks: int, schedule: str) -> None:
    at = 3 * blocks + SCHEDULES.index(schedule)
    for turn in range(2):
        torch.manual_seed(2 * at + turn)
        shape, dtype = SHAPES[(at + turn) % len(SHAPES)], HALVES[(at + turn) % 2]
        rows, bias = INPUTS[(2 * at + turn) % len(INPUTS)], torch.randn(shape[0]).to(dtype) if turn else None
        input, given = torch.randn(rows, shape[1]).to(dtype), nested(blocks, *shape)
        activations = ("floating", "int8-token", "int8-block")[at % 3]
        check_planes(kernels, input, given, bias, activations=activations, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_factors_are_those_of_the_reference(kernels: Kernels, blocks: int, schedule: str) -> None:
    at = 3 * blocks + SCHEDULES.index(schedule)
    for turn in range(2):
        torch.manual_seed(2 * at + turn)
        (out, width, _), dtype = SHAPES[(at + 3 * turn) % len(SHAPES)], HALVES[(at + turn) % 2]
        rows, rank = INPUTS[(2 * at + turn) % len(INPUTS)], RANKS[(at + turn) % len(RANKS)]
        bias = torch.randn(out).to(dtype) if turn else None
        input, given = torch.randn(rows, width).to(dtype), factors(blocks, out, width, rank)
        check_factors(kernels, input, given, bias, schedule=schedule)


@pytest.mark.parametrize("rows", [1, 32])
def test_every_bit_is_read_once(kernels: Kernels, rows: int) -> None:
    input = torch.randn(rows, 1024).half()
    planes, scales = nested(3, 32, 1024, 8)
    device = check_planes(kernels, input, (planes, scales), None)
    for plane in planes[1:]:
        assert device.traffic(plane).read == device.traffic(plane).sectors == plane.numel()
    given = factors(2, 64, 1024, 16)
    device = check_factors(kernels, input, given, None)
    for plane in given[0]:  # in four steps, of which all but one come from the first-level cache
        assert device.traffic(plane).read / 4 == device.traffic(plane).sectors == plane.numel()
    for right in given[2]:  # once for each 16 rows of the weight
        assert device.traffic(right).read == 64 // 16 * right.nbytes


def test_the_operators_start_them(emulate: Callable[[str], Device]) -> None:
    device, input = emulate("stacks.cu"), torch.randn(2, 3, 96).half()
    planes, blocks = nested(3, 24, 96, 3), factors(2, 24, 96, 16)
    found = stack_ops._plane_linear_cuda(input, *planes, None, "floating")
    compared(found, 0, reference.plane_linear(input.float(), *planes, None, "floating"), torch.float16)
    before = device.counts.multiply_adds
    assert before > 0
    found = stack_ops._factor_linear_cuda(input, *blocks, None)
    compared(found, 0, reference.factor_linear(input.float(), *blocks, None), torch.float16)
    assert device.counts.multiply_adds > before


def test_what_kernels_do_not_take_is_left_to_the_reference(emulate: Callable[[str], Device]) -> None:
    device, narrow = emulate("stacks.cu"), nested(2, 24, 96, 6)
    for input, given in ((torch.randn(2, 96).half(), narrow), (torch.randn(2, 96), nested(2, 24, 96, 3))):
        found = stack_ops._plane_linear_cuda(input, *given, None, "floating")
        assert torch.equal(found, reference.plane_linear(input, *given, None, "floating"))
    many, input = factors(129, 8, 40, 1), torch.randn(2, 40).half()
    assert torch.equal(
        stack_ops._factor_linear_cuda(input, *many, None), reference.factor_linear(input, *many, None)
    )
    assert device.counts.multiply_adds == 0
    for name in ("plane_linear", "factor_linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compress::{name}", "CUDA")


BUGS_OF_PLANES = {
    "order of the bits": ("0x0123", "0x3210"),
    "even and odd columns": ("word >> 1 & 0x55555555", "word & 0x55555555"),
    "place of a plane": ("const int place = N - 1 - i,", "const int place = i,"),
    "tail of the bytes": ("byte + i < pitch", "byte + i <= pitch"),
    "half a step": ("0.5f * ((1 << N) - 1)", "0.5f * (1 << N)"),
}
SUM = "  for (int at = threadIdx.x; at < TILES * 8 * ROWS"
BUGS_OF_FACTORS = {
    "signs the wrong way round": ("= ~signs_of(", "= signs_of("),
    "wrong fragment of the right factor": ("j / 2 * 8 + j % 2, column", "j / 2 * 2 + j % 2, column"),
    "wrong fragment of the left factor": ("at = from + t * 2 + j / 2 * 8;", "at = from + t * 2 + j / 2 * 2;"),
    "wrong sign of a column": ("k % 2 * 4 + j) << 31", "k % 2 + j) << 31"),
    "wrong fragment of the weight": ("+ i / 2 % 2][i % 2 * 2]", "+ i % 2][i / 2 % 2 * 2]"),
    "input in another order": ("__byte_perm(x[0], x[2], 0x5410)", "x[0]"),
    "tail of the ranks": ("at + 2 <= count &&", "at <= count &&"),
    "tail of the columns": ("at + 4 <= count &&", "at < count &&"),
    "missing barrier": (f"__syncthreads();\n{SUM} * ROW_WARPS", f"{SUM} * ROW_WARPS"),
}  # fmt: skip
FEW = {
    **{f"case {n}: return run(Nested<{n}>());": "" for n in range(2, 9) if n != 4},
    **FEWER,
    "if (type == FLOAT16) return factors_multiplied<half>(p, stream);": "",
    ": run(multiply_factors<T, FACTOR_TILES>, FACTOR_TILES);": ": cudaErrorInvalidValue;",
}
"""Leaves one kernel of each kind, which are sooner compiled."""


@pytest.mark.parametrize("bug", [*BUGS_OF_PLANES, *BUGS_OF_FACTORS])
def test_a_planted_bug_is_found(bug: str) -> None:
    right, wrong = (BUGS_OF_PLANES | BUGS_OF_FACTORS)[bug]
    torch.manual_seed(0)
    kernels, input = Kernels(SOURCE, {**FEW, right: wrong}), torch.randn(3, 198).bfloat16()
    planes = bug in BUGS_OF_PLANES
    check: Any = check_planes if planes else check_factors
    given: Any = nested(3, 23, 198, 1) if planes else factors(2, 23, 198, 9)
    with pytest.raises((AssertionError, EmulationError)):
        check(kernels, input, given, None)
