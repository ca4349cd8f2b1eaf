"""Packer against a bit stream written out with Python integers, and the traps of GPTQ zero points."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.codes.packing import (
    BITS,
    pack,
    pack_gptq_zeros,
    packed_width,
    unpack,
    unpack_gptq_zeros,
)
from compress.storage.formats.gptq import GPTQFormat


def codes_of(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)


def words_of(codes: list[int], bits: int) -> list[int]:
    """The dense stream of one row as unsigned 32-bit words."""
    stream = sum(code << (bits * position) for position, code in enumerate(codes))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.tolist()]


@given(
    bits=st.sampled_from(BITS), rows=st.integers(1, 4), count=st.integers(1, 130), seed=st.integers(0, 2**31)
)
def test_pack_is_the_dense_stream_and_unpack_its_inverse(bits, rows, count, seed):
    codes = codes_of(rows, count, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_width(count, bits))
    for row, packed in zip(codes, words):
        assert unsigned(packed) == words_of(row.tolist(), bits)
    assert torch.equal(unpack(words, bits, count), codes)


def test_three_bits_straddle_words_as_gptq_stores_them():
    v = codes_of(1, 32, 3)[0].tolist()
    w0 = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30
    w1 = v[10] >> 2 | sum(v[11 + i] << (1 + 3 * i) for i in range(10)) | (v[21] & 1) << 31
    w2 = v[21] >> 1 | sum(v[22 + i] << (2 + 3 * i) for i in range(10))
    assert unsigned(pack(torch.tensor([v], dtype=torch.uint8), 3)[0]) == [w0, w1, w2]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_transposed_stream_is_the_gptq_qweight(bits):
    """Word r of a column holds input rows r·(32/b) + j at bit b·j."""
    codes = codes_of(3, 64, bits)
    qweight = pack(codes, bits).t()
    per_word = 32 // bits
    for column in range(3):
        for r, word in enumerate(unsigned(qweight[:, column])):
            for j in range(per_word):
                assert (word >> (bits * j)) & (2**bits - 1) == codes[column, r * per_word + j]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "count"), [(64, 96), (1, 96), (64, 4), (1, 1)])
def test_transposed_tensors_pack_and_unpack(bits, rows, count):
    """Also where an axis has length 1, whose stride means nothing."""
    codes = codes_of(rows, count, bits)
    standing = codes.t().contiguous()
    assert torch.equal(pack(standing.t(), bits), pack(codes, bits))
    stored = pack(codes, bits).t().contiguous()
    assert torch.equal(unpack(stored.t(), bits, count), codes)


@given(bits=st.sampled_from(GPTQFormat.widths), version=st.sampled_from([1, 2]), seed=st.integers(0, 2**31))
def test_gptq_zeros_round_trip(bits, version, seed):
    zeros = codes_of(32, 5, bits, seed)
    if version == 1:
        zeros = zeros.clamp(min=1)
    qzeros = pack_gptq_zeros(zeros, bits, version)
    assert qzeros.shape == (5, bits)
    assert torch.equal(unpack_gptq_zeros(qzeros, bits, 32, version), zeros)


@pytest.mark.parametrize("bits", GPTQFormat.widths)
def test_version_1_stores_one_less_and_version_2_what_it_is(bits):
    zeros = codes_of(32, 1, bits).clamp(min=1)
    v1, v2 = (pack_gptq_zeros(zeros, bits, version) for version in (1, 2))
    assert unsigned(v1[0]) == words_of([z - 1 for z in zeros[:, 0].tolist()], bits)
    assert unsigned(v2[0]) == words_of(zeros[:, 0].tolist(), bits)


@pytest.mark.parametrize("bits", GPTQFormat.widths)
def test_version_1_refuses_a_zero_point_of_0_and_version_2_keeps_it(bits):
    zeros = codes_of(32, 2, bits).clamp(min=1)
    zeros[3, 1] = 0
    with pytest.raises(ValueError, match="zero point of 0"):
        pack_gptq_zeros(zeros, bits, version=1)
    assert torch.equal(unpack_gptq_zeros(pack_gptq_zeros(zeros, bits, 2), bits, 32, 2), zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_come_back_from_files_gptqmodel_wrote(bits):
    """It subtracts ones from the packed word, so a 0 borrows from its neighbours, and adds them again."""
    zeros = codes_of(32, 1, bits)
    zeros[::3] = 0
    ones = words_of([1] * (32 // bits), bits)[0]
    stored = [(word - ones) & 0xFFFFFFFF for word in words_of(zeros[:, 0].tolist(), bits)]
    qzeros = torch.tensor([stored], dtype=torch.int64).to(torch.int32)
    assert torch.equal(unpack_gptq_zeros(qzeros, bits, 32, version=1), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_a_large_matrix_takes_well_under_a_second(bits):
    codes = codes_of(4096, 4096, bits)
    start = time.perf_counter()
    words = pack(codes, bits)
    unpack(words, bits, 4096)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits can"):
        pack(codes_of(1, 8, 3), bits)


@given(
    bits=st.sampled_from(BITS), rows=st.integers(1, 4), count=st.integers(1, 130), seed=st.integers(0, 2**31)
)
def test_compressed_tensors_packs_the_same(bits, rows, count, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(rows, count, bits, seed)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
