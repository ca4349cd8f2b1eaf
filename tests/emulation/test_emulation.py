"""The emulation itself: right kernels pass in every schedule, and bugs that are planted in them do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.emulation.emulator import SCHEDULES, EmulationError, Kernels

SOURCE = Path(__file__).parent / "kernels" / "products.cu"
STRICTLY = "strict"
"""A schedule of its own for bugs that are found by looking at accesses and barriers, not at results."""


def rows(kernels: Kernels, schedule: str, strict: bool) -> bool:
    """Whether the product of rows is right, with a width that fills no vector."""
    weight, x, y = torch.randn(13, 77), torch.randn(77), torch.full((13,), torch.nan)
    kernels("test_rows", weight, x, y, 13, 77, written=(y,), schedule=schedule, strict=strict)
    return torch.allclose(y, weight @ x, atol=1e-4)


def fragment(kernels: Kernels, schedule: str, strict: bool) -> bool:
    """Whether the product of one tensor core is right."""
    a, b, d = torch.randn(16, 16).half(), torch.randn(8, 16).half(), torch.full((16, 8), torch.nan)
    kernels("test_fragment", a, b, d, written=(d,), schedule=schedule, strict=strict)
    return torch.allclose(d, a.float() @ b.float().t(), atol=1e-4)


def total(kernels: Kernels, schedule: str, strict: bool) -> bool:
    """Whether the sum over many blocks is right."""
    x, y = torch.randn(1000), torch.zeros(1)
    kernels("test_total", x, y, 1000, written=(y,), schedule=schedule, strict=strict)
    return torch.allclose(y, x.sum(), atol=1e-3)


CASES = {case.__name__: case for case in (rows, fragment, total)}

BUGS = {
    "missing wait": ("rows", "ptx::copy_async_wait<0>();", "", "forward", "(wrong result)"),
    "missing barrier": ("rows", "<0>();\n  __syncthreads();", "<0>();", "forward", "(wrong result)"),
    "missing barrier, seen as a race": (
        *("rows", "<0>();\n  __syncthreads();", "<0>();", STRICTLY),
        "of shared memory after thread",
    ),
    "barrier in a divergent branch": (
        *("rows", "  const int row", "  if (threadIdx.x < 32) __syncthreads();\n  const int row"),
        *(STRICTLY, "some threads never reach"),
    ),
    "barrier after threads have ended": (
        *("rows", "if (lane == 0) y[row] = sum;", "__syncthreads();\n  if (lane == 0) y[row] = sum;"),
        *(STRICTLY, "ended threads never reach"),
    ),
    "two barriers at once": (
        *(
            "total",
            "__syncthreads();\n  turned",
            "if (threadIdx.x < 9)\n __syncthreads();\n else\n __syncthreads();\n turned",
        ),
        *(STRICTLY, "but thread"),
    ),
    "wrong fragment of B": ("fragment", "2 * t + 8);", "2 * t + 4);", "forward", "(wrong result)"),
    "wrong row of D": ("fragment", "8 * (r / 2)", "8 * (r % 2)", "forward", "(wrong result)"),
    "missing barrier of a warp": ("fragment", "__syncwarp();", "", STRICTLY, "no barrier lies"),
    "tail of a tensor, off by one": (
        "total",
        "i < count ?",
        "i <= count ?",
        "forward",
        "which has 4000 bytes",
    ),
    "tail that is not read": ("total", "i < count ?", "i < count - 1 ?", "forward", "(wrong result)"),
    "output past its end": ("rows", "if (row >= out)", "if (row > out)", "forward", "which has 4004 bytes"),
    "shared memory past its end": (
        *("rows", "sizeof(float) * width", "sizeof(float) * (width - 1)", "forward"),
        "past the dynamic shared memory",
    ),
    "odd address of a vector": (
        *(
            "fragment",
            "(const uint4*)(a + lane * 8)",
            "(const uint4*)(a + (lane ? lane * 8 - 4 : 0))",
            "forward",
        ),
        "no multiple of 16",
    ),
    "shared memory is overwritten too early": (
        *("total", "    __syncthreads();\n", "", STRICTLY),
        "no barrier lies",
    ),
    "lane that does not take part": (
        "rows",
        "(~0u, sum, offset)",
        "(0xffffu, sum, offset)",
        "forward",
        "not in",
    ),
    "lanes that wait for each other": (
        *(
            "rows",
            "if (lane == 0) y",
            "if (lane < 16) __syncwarp(); else __ballot_sync(~0u, 1);\n  if (lane == 0) y",
        ),
        *("forward", "all threads wait"),
    ),
    "write into an input": (
        "rows",
        "y[row] = sum",
        "((float*)x)[0] = y[row] = sum",
        "forward",
        "writes into",
    ),
    "sum that is not atomic": (
        "total",
        "atomicAdd(y, turned[0])",
        "*y = turned[0]",
        "forward",
        "(wrong result)",
    ),
    "copy from an odd address": (
        *("rows", "(shared + 4 * i, x + 4 * i)", "(shared + 4 * i, x + 4 * i + 1)", "forward"),
        "from or to an odd address",
    ),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_right_kernels_pass(case, schedule, strict, kernels):
    assert case(kernels, schedule, strict)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    case, right, wrong, schedule, sentence = BUGS[bug]
    kernels, strict = Kernels(SOURCE, {right: wrong}), schedule == STRICTLY
    try:
        is_right = CASES[case](kernels, "forward" if strict else schedule, strict)
        found = "the result is right" if is_right else "(wrong result)"
    except EmulationError as error:
        found = str(error)
    assert sentence in found


def test_what_a_call_moves_is_counted(kernels):
    weight, x, y = torch.randn(13, 77), torch.randn(77), torch.empty(13)
    counts = kernels("test_rows", weight, x, y, 13, 77, written=(y,))
    moved = counts.traffic
    assert moved["argument 0"].read == 4 * 13 * 77
    assert moved["argument 1"].read == 4 * 4 * 77  # each of 4 blocks
    assert moved["argument 1"].copied == 4 * 4 * 76  # all but the tail
    assert moved["argument 1"].sectors == 320
    assert moved["argument 2"].written == 4 * 13
    assert counts.multiply_adds == 13 * 77
    # Neighbouring lanes read neighbouring words, so a sector is fetched again only where rows or turns meet.
    assert 4 * 13 * 77 <= moved["argument 0"].fetched <= 4 * 13 * 77 + 32 * 13 * 4


def test_lanes_that_read_apart_fetch_more():
    kernels = Kernels(
        SOURCE, {"weight[(size_t)row * width + i]": "weight[(size_t)row * width + i * 8 % width]"}
    )
    weight, x, y = torch.randn(13, 77), torch.randn(77), torch.empty(13)
    counts = kernels("test_rows", weight, x, y, 13, 77, written=(y,))
    assert counts.traffic["argument 0"].fetched > 3 * 4 * 13 * 77


def test_a_launch_that_no_device_takes_is_an_error(kernels):
    weight, x, y = torch.randn(1, 20000), torch.randn(20000), torch.empty(1)
    with pytest.raises(EmulationError, match="more dynamic shared memory"):
        kernels("test_rows", weight, x, y, 1, 20000, written=(y,))
    with pytest.raises(EmulationError, match="at least one block"):
        kernels("test_rows", weight, x, y, 0, 4, written=(y,))
