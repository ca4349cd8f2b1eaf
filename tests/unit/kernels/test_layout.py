"""Strips of 16 rows against their definition, written out bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.cpu.layout import (
    BITS,
    chunk_of,
    from_strips,
    groups_from_strips,
    groups_of,
    groups_to_strips,
    planes_of,
    strip_bytes,
    strips_of,
    to_strips,
)


def codes_of(out: int, width: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)


shapes = {
    "bits": st.sampled_from(BITS),
    "out": st.integers(1, 40),
    "width": st.integers(1, 150),
    "group_size": st.sampled_from([-1, 1, 8, 16, 24, 32, 64, 128]),
    "seed": st.integers(0, 2**31),
}


@given(**shapes)
def test_every_code_comes_back(bits, out, width, group_size, seed):
    codes = codes_of(out, width, bits, seed)
    packed = to_strips(codes, bits, group_size)
    assert packed.shape == (strips_of(out), strip_bytes(width, bits, group_size))
    assert packed.dtype == torch.uint8
    assert torch.equal(from_strips(packed, bits, group_size, out, width), codes)


@given(**shapes)
def test_a_code_lies_where_the_layout_says(bits, out, width, group_size, seed):
    codes = codes_of(out, width, bits, seed)
    packed = to_strips(codes, bits, group_size)
    row, column = seed % out, seed // out % width
    group_size = width if group_size == -1 else group_size
    before = sum(
        -(-min(group_size, width - start) // chunk_of(bits))
        for start in range(0, column // group_size * group_size, group_size)
    )
    chunk, place = divmod(column % group_size, chunk_of(bits))
    at, code, shift = (before + chunk) * chunk_of(bits) * bits * 2, 0, 0
    for plane in planes_of(bits):
        line, rest = divmod(place, 32 // plane)
        byte = int(packed[row // 16, at + 64 * line + 4 * (row % 16) + rest % 4])
        code |= (byte >> plane * (rest // 4) & 2**plane - 1) << shift
        at, shift = at + chunk_of(bits) * plane * 2, shift + plane
    assert code == codes[row, column]


@given(out=st.integers(1, 40), groups=st.integers(1, 5), dtype=st.sampled_from([torch.float16, torch.uint8]))
def test_scales_are_vectors_of_16_rows(out, groups, dtype):
    values = torch.arange(1, out * groups + 1).view(out, groups).to(dtype)
    arranged = groups_to_strips(values)
    assert arranged.shape == (strips_of(out), groups, 16)
    assert arranged.is_contiguous()
    row = out - 1
    assert torch.equal(arranged[row // 16, :, row % 16], values[row])
    assert int((arranged != 0).sum()) == values.numel()
    assert torch.equal(groups_from_strips(arranged, out), values)


def test_codes_of_e4m3_keep_their_type():
    codes = torch.randn(20, 40).to(torch.float8_e4m3fn)
    packed = to_strips(codes, 8, -1)
    assert packed.dtype == torch.float8_e4m3fn
    assert torch.equal(from_strips(packed, 8, -1, 20, 40).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("bits", "planes"), [(2, [2]), (3, [2, 1]), (5, [4, 1]), (6, [4, 2]), (7, [4, 2, 1])]
)
def test_planes_go_from_wide_to_narrow(bits, planes):
    assert planes_of(bits) == planes
    assert (groups_of(100, 32), groups_of(100, -1)) == (4, 1)
