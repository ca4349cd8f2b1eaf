"""packed_linear and packed_embedding of ``source/linear.cu`` against the reference, emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.kernels.codes.packing import BITS, pack
from compress.kernels.cuda import linear
from compress.kernels.reference import embedding, ops
from tests.emulation.build import CUDA
from tests.emulation.emulator import FEWER, SCHEDULES, Device, Kernels

SOURCE = CUDA / "linear.cu"
HALVES = (torch.float16, torch.bfloat16)

# What each width is tried with in each schedule: every value meets every width, or every schedule.
SHAPES = (
    (16, 128, 32),
    (33, 128, 64),
    (7, 256, 128),
    (16, 77, -1),
    (40, 200, -1),
    (1, 1152, 128),
    (17, 96, 32),
)
"""Rows of the weight, columns, and columns that share a scale."""

INPUTS = (1, 64, 3, 8, 17, 9, 70, 2, 33)
"""Rows of the input."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


def weight(
    bits: int, out: int, width: int, group: int, scale: torch.dtype, zeros: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None]:
    """A random one: packed, scales, zeros, no table."""
    groups = 1 if group == -1 else width // group
    packed = pack(torch.randint(2**bits, (out, width), dtype=torch.uint8), bits)
    scales = (torch.rand(out, groups) + 0.5).div(2 ** (bits - 1) * width**0.5).to(scale)
    points = torch.randint(2**bits, (out, groups), dtype=torch.uint8) if zeros else None
    return packed, scales, points, None


def check(
    kernels: Kernels,
    input: torch.Tensor,
    given: tuple[Any, ...],
    bias: torch.Tensor | None,
    rest: tuple[Any, ...],
    **setting: Any,
) -> Device:
    """Make sure that a product is the reference's; what is left is the order of sums."""
    inputs = [tensor for tensor in (input, bias, *given) if tensor is not None]
    with Device(kernels, inputs, **setting) as device:
        found, error = linear.multiply(device.library, input, *given, bias, *rest, None)
    exact = ops.packed_linear(input.float(), *given, None if bias is None else bias.float(), *rest)
    unit = float(exact.abs().max())
    assert error == 0
    assert found.dtype == input.dtype
    assert found.shape == exact.shape
    assert (
        float((found.float() - exact).abs().max())
        <= (2e-3 if input.dtype == torch.float16 else 1.6e-2) * unit
    )
    return device


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_the_reference(kernels: Kernels, bits: int, schedule: str) -> None:
    at = 3 * bits + SCHEDULES.index(schedule)
    for turn in range(3):
        torch.manual_seed(at * 3 + turn)
        out, width, group = SHAPES[(at + 2 * turn) % len(SHAPES)]
        dtype, rows = HALVES[(at + turn) % 2], INPUTS[(at * 3 + turn) % len(INPUTS)]
        given = weight(
            *(bits, out, width, group, (torch.float32, *HALVES)[turn]),
            zeros=(at + turn) % 3 > 0,
        )
        bias = torch.randn(out).to(dtype) if turn == 1 else None
        activations = ("floating", "int8-token", "int8-block")[turn]
        input = torch.randn(rows, width).to(dtype)
        check(kernels, input, given, bias, (bits, group, out, activations), schedule=schedule)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "batch"), [((1,), 1), ((2, 3), 6), ((64,), 64)])
def test_every_weight_is_read_once(kernels: Kernels, rows: tuple[int, ...], batch: int, bits: int) -> None:
    out, width = 32, 1024
    packed, scales, zeros, _ = weight(bits, out, width, 128, torch.float16)
    input = torch.randn(*rows, width).to(HALVES[bits % 2])
    device = check(kernels, input, (packed, scales, zeros, None), None, (bits, 128, out, "floating"))
    size = packed.numel() * packed.element_size()
    assert device.traffic(packed).read == device.traffic(packed).sectors == size
    if bits in (2, 4, 8):  # the others come through the first-level cache
        assert device.traffic(packed).fetched == size
    assert device.traffic(input).sectors == input.numel() * 2
    least = out * width * -(-batch // 8) * 8  # the narrowest product of tensor cores has eight columns
    assert least <= device.counts.multiply_adds <= 1.05 * least


# Rows of the weight, columns, columns that share a scale, and rows of the input.
MANY = ((70, 1160, -1, 17), (65, 640, 64, 9), (130, 512, 128, 64), (64, 1056, 32, 33), (33, 2048, 64, 100))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_many_rows_come_through_shared_memory(kernels: Kernels, bits: int, schedule: str) -> None:
    torch.manual_seed(bits)
    out, width, group, rows = MANY[(bits + SCHEDULES.index(schedule)) % len(MANY)]
    given = weight(bits, out, width, group, torch.float16)
    input, bias = torch.randn(rows, width).bfloat16(), torch.randn(out).bfloat16()
    device = check(kernels, input, given, bias, (bits, group, out, "floating"), schedule=schedule)
    moved = device.traffic(input)
    # Once for 64 rows of the weight, and never but by asynchronous copies.
    assert moved.read == moved.copied == input.numel() * 2 * -(-out // 64)


@pytest.mark.parametrize(("rows", "kernel"), [(2, "few"), (20, "many")])
def test_blocks_that_share_the_columns(kernels: Kernels, rows: int, kernel: str, monkeypatch) -> None:
    """Up to eight; a last one may have nothing to do. The sums are added in the same order every time."""
    given, bias = weight(4, 40, 1536, 128, torch.float16), torch.randn(40).half()
    input = torch.randn(rows, 1536).half()
    found = []
    for splits in (1, 5, 8):
        monkeypatch.setattr(linear, "splits_of", lambda *_, splits=splits: splits)
        for schedule in SCHEDULES:
            check(kernels, input, given, bias, (4, 128, 40, "floating"), schedule=schedule)
            with Device(kernels, [input, bias, *given[:3]], schedule=schedule) as device:
                found.append(
                    linear.multiply(device.library, input, *given, bias, 4, 128, 40, "floating", None)[0]
                )
        assert torch.equal(found[-1], found[-2])
        assert torch.equal(found[-1], found[-3])


@pytest.mark.parametrize(
    ("rows", "out", "width", "splits"),
    [
        (1, 14336, 4096, 1),  # 896 blocks
        (1, 2048, 2048, 1),  # one step of eight warps each
        (1, 2048, 8192, 4),
        (16, 4096, 14336, 8),
        (64, 4096, 14336, 8),
        (64, 28672, 8192, 1),
        (2048, 4096, 4096, 1),
    ],
)
def test_columns_are_shared_where_blocks_are_few(rows: int, out: int, width: int, splits: int) -> None:
    assert linear.splits_of(rows, out, width) == splits


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_tables_are_those_of_the_reference(kernels: Kernels, bits: int, schedule: str) -> None:
    out, width, group = SHAPES[(bits + SCHEDULES.index(schedule)) % len(SHAPES)]
    packed, scales, zeros, _ = weight(bits, out, width, group, torch.float16)
    rows = torch.randint(out, (2, 3))
    with Device(kernels, [packed, scales], schedule=schedule) as device:
        found, error = linear.embed(device.library, rows, packed, scales, zeros, bits, group, width, None)
    assert error == 0
    assert torch.equal(
        found, embedding.packed_embedding(rows, packed, scales, zeros, bits, group, out, width)
    )


BUGS = {
    "missing barrier": ("[lane] = d[tile][i];\n  __syncthreads();", "[lane] = d[tile][i];\n"),
    "barrier in a divergent branch": (
        "  float d[TILES][4];",
        "  if (warp < 7) __syncthreads();\n  float d[TILES][4];",
    ),
    "wrong fragment of the weight": ("i / 2 % 2 * 2 + i / 4 * 4", "i / 2 % 2 * 4 + i / 4 * 2"),
    "wrong fragment of the sums": ("row / 8 * 2 + column % 2", "row / 8 + column % 2 * 2"),
    "tail of the rows": ("if (row < w.out)", "if (row <= w.out)"),
    "tail of the columns": ("at + 8 <= width &&", "at + 8 <= width + 8 &&"),
    "missing wait": ("ptx::copy_async_wait<STAGES<TILES> - 2>();", ""),
    "missing barrier of the stages": ("    __syncthreads();  // the copies", "    // the copies"),
    "stage of another block": (
        "stages[block % STAGES<TILES>];\n#pragma",
        "stages[(block + 1) % STAGES<TILES>];\n#pragma",
    ),
    "wrong place in a stage": ("stage + place_of(row, part, of)", "stage + place_of(row, of, part)"),
    "a copy past the columns": ("&& column < w.width;", ";"),
    "tail of the parts": ("if (at >= all) return;", "if (at > all) return;"),
    "tail of the inputs": ("if (to < w.out && input < p.rows)", "if (to < w.out && input <= p.rows)"),
}
TWO_KERNELS = {
    **{f"case {bits}: return run(Integer<{bits}>());": "" for bits in BITS if bits != 4},
    **FEWER,
}
"""Leaves two kernels of products, for few rows and for up to 32, which are sooner compiled."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    right, wrong = BUGS[bug]
    kernels = Kernels(SOURCE, {**TWO_KERNELS, right: wrong})

    def all_right() -> None:
        for rows, width in ((3, 200), (20, 200), (20, 2048)):
            input, given = torch.randn(rows, width).bfloat16(), weight(4, 23, width, -1, torch.float16)
            check(kernels, input, given, None, (4, -1, 23, "floating"))

    with pytest.raises(AssertionError):  # of the result, or an EmulationError
        all_right()
