"""Block types against the decoder of the gguf package, which knows all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.kernels.codes.gguf import TYPES, find_type

gguf = pytest.importorskip("gguf")
BLOCKS = [kind for kind in TYPES.values() if kind.dtype is None]
LLAMA_CPP = {
    "Q4_0": 6.103e-3,
    "Q4_1": 4.264e-3,
    "Q5_0": 1.506e-3,
    "Q5_1": 9.963e-4,
    "Q8_0": 2.864e-5,
    "Q2_K": 5.796e-2,
    "Q3_K": 1.842e-2,
    "Q4_K": 4.396e-3,
    "Q5_K": 1.125e-3,
    "Q6_K": 2.656e-4,
    "IQ4_NL": 5.094e-3,
    "IQ4_XS": 5.206e-3,
}
HALF = float(torch.finfo(torch.float16).max)
kinds = st.sampled_from(BLOCKS)
seeds = st.integers(0, 2**31)


def theirs(blocks: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def share(decoded: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor) -> float:
    return float(((decoded - weight) ** 2 * importance).sum() / (weight**2 * importance).sum())


def test_the_table_has_the_sizes_and_numbers_of_the_gguf_package() -> None:
    for kind in TYPES.values():
        number = gguf.GGMLQuantizationType[kind.name]
        assert (kind.number, (kind.size, kind.nbytes)) == (number, gguf.GGML_QUANT_SIZES[number])


@given(kind=kinds, rows=st.integers(1, 3), blocks=st.integers(1, 3), seed=seeds)
def test_any_bytes_are_read_as_the_gguf_package_reads_them_and_written_back(
    kind, rows: int, blocks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, blocks * kind.nbytes), generator=generator, dtype=torch.int32).to(
        torch.uint8
    )
    np.testing.assert_array_equal(kind.decode(data).numpy(), theirs(data, kind.name))
    again = kind.pack(kind.unpack(data)).view(data.shape)
    # A NaN may come back as another NaN.
    finite = torch.tensor(np.isfinite(theirs(data, kind.name)).reshape(rows * blocks, -1).all(1))
    assert torch.equal(again.view(-1, kind.nbytes)[finite], data.view(-1, kind.nbytes)[finite])


@given(
    kind=kinds,
    rows=st.integers(1, 4),
    blocks=st.integers(1, 2),
    size=st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 3e4]),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
    weighted=st.booleans(),
    seed=seeds,
)
@example(kind=TYPES["Q4_1"], rows=1, blocks=1, size=3e4, shift=-3.0, weighted=False, seed=0)
def test_what_is_rounded_is_near_the_weight_and_read_alike(
    kind, rows: int, blocks: int, size: float, shift: float, weighted: bool, seed: int
) -> None:
    weight = (normal(rows, blocks * kind.size, seed) + shift) * size
    importance = normal(1, weight.shape[1], seed + 1)[0] ** 2 if weighted else None
    # These two store a number near the least weight of a block in float16; the others, parts of it.
    least = float(weight.min()) / HALF if kind.name in ("Q4_1", "Q5_1") else 0.0
    if least < -1.1:
        with pytest.raises(BadInput, match=f"^A weight holds values too large for {kind.name}.$"):
            kind.encode(weight, importance)
        return
    if least < -0.9:
        return  # it depends on the other weights of the block
    found = kind.encode(weight, importance)
    assert found.dtype == torch.uint8
    assert found.shape == (rows, kind.row_bytes(weight.shape[1]))
    decoded = kind.decode(found)
    np.testing.assert_array_equal(decoded.numpy(), theirs(found, kind.name))
    if size in (1.0, 3e4):
        counts = torch.ones(weight.shape[1]) if importance is None else importance
        assert share(decoded, weight, counts) < (0.2 if kind.name == "Q2_K" else 0.1)
    else:
        assert float((decoded - weight).abs().max()) <= float(weight.abs().max()) + 1e-6


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_rounding_is_no_worse_than_that_of_llama_cpp(kind) -> None:
    """The figures are those of its ggml_quantize_chunk (llama-cpp-python 0.3.36) for the same numbers."""
    weight, importance = normal(64, 1536) * 0.05, torch.rand(1536, generator=torch.Generator().manual_seed(1))
    found = share(kind.decode(kind.encode(weight, importance**2)), weight, importance**2)
    assert found < LLAMA_CPP[kind.name]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_importance_moves_the_error_to_where_it_counts_less(kind) -> None:
    weight = normal(16, 512)
    importance = torch.where(torch.arange(512) % 4 == 0, 100.0, 1.0)
    plain, weighted = kind.decode(kind.encode(weight)), kind.decode(kind.encode(weight, importance))
    assert share(weighted, weight, importance) < share(plain, weight, importance)
    assert share(plain, weight, torch.ones(512)) < share(weighted, weight, torch.ones(512))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_what_lies_on_the_grid_of_a_plain_type_stays(kind) -> None:
    weight = kind.decode(kind.encode(normal(8, 512)))
    again = kind.decode(kind.encode(weight))
    limit = 1e-9 if kind.size == 32 else 2e-3
    assert share(again, weight, torch.ones(512)) < limit


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_weight_that_is_zero_or_constant_is_kept(kind) -> None:
    assert not kind.decode(kind.encode(torch.zeros(2, 256))).any()
    for value in (0.5, -0.5):
        found = kind.decode(kind.encode(torch.full((2, 256), value)))
        torch.testing.assert_close(found, torch.full((2, 256), value), rtol=2e-2, atol=0)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(
        BadInput, match="Rows of 576 weights cannot have the type Q4_K, whose blocks have 256"
    ):
        find_type("q4_k").encode(torch.zeros(1, 576))


def test_an_unknown_type_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(BadInput, match="no GGUF type 'Q4_KM'; did you mean 'Q4_K'"):
        find_type("Q4_KM")


def test_nan_and_numbers_too_large_for_float16_are_refused() -> None:
    with pytest.raises(BadInput, match="NaN"):
        find_type("Q8_0").encode(torch.full((1, 32), float("nan")))
    with pytest.raises(BadInput, match="too large for float16"):
        find_type("F16").encode(torch.full((1, 2), 1e6))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_numbers_without_blocks_are_stored_as_they_are(name: str) -> None:
    weight = normal(3, 5).to(TYPES[name].dtype)
    found = TYPES[name].encode(weight)
    assert torch.equal(TYPES[name].decode(found), weight.float())
    np.testing.assert_array_equal(theirs(found, name), weight.float().numpy())
