"""Attention over keys and values in codes: every path of this machine against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels.cache_ops import BITS, kv_attention, kv_quantize
from compress.kernels.codes.minmax import quantize
from compress.kernels.cpu.library import AUTO, paths, use
from compress.kernels.reference.cache import dequantize

QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["reference", *(f"cpu:{path}" for path in paths())])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(AUTO)


@given(
    st.sampled_from(BITS),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@QUICK
def test_codes_and_scales_are_those_of_the_quantizer(
    kernel: str, bits: int, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(shape).mul_(3).to(dtype)
    vectors[0, 0] = 0
    vectors.view(-1)[-1] = 0.5
    codes, scales = quantize(vectors, bits)
    packed, found = kv_quantize(vectors, bits)
    assert torch.equal(found, scales)
    groups, width = shape[2:]
    assert torch.equal(dequantize(packed, torch.ones_like(found), groups, width, bits), codes)


def attention_in_float64(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Keys and values [B, heads, T, width]; the mask is added."""
    query, keys, values = query.double(), keys.double(), values.double()
    if rotation is not None:
        cosines, sines = (part.double().unsqueeze(1) for part in rotation)
        half = cosines.shape[-1] // 2
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        a, b = (
            a * cosines[..., :half] - b * sines[..., :half],
            b * cosines[..., half:] + a * sines[..., half:],
        )
        keys = torch.cat([a, b, rest], dim=-1)
    shared = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    scores = query @ keys.transpose(2, 3) * scaling + mask.double()
    return (scores.softmax(-1) @ values).transpose(1, 2)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    return {
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "shared": draw(st.integers(1, 3)),
        "queries": draw(st.integers(1, 5)),
        "before": draw(st.integers(0, 30)),
        "width": draw(st.integers(1, 40)),
        "bits": draw(st.sampled_from(BITS)),
        "per_head": draw(st.booleans()),
        "rotated": draw(st.sampled_from(["none", "all", "some"])),
        "mask": draw(st.sampled_from(["none", "bool", "float", "of heads"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(cases())
@QUICK
def test_attention(kernel: str, case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    batch, heads, width, queries = case["batch"], case["heads"], case["width"], case["queries"]
    tokens, all_heads, dtype = queries + case["before"], heads * case["shared"], case["dtype"]
    query = torch.randn(batch, all_heads, queries, width).to(dtype)
    coded, dense = [], []
    for _ in range(2):
        vectors = torch.randn(batch, tokens, heads, width)
        vectors = vectors if case["per_head"] else vectors.flatten(-2).unsqueeze(-2)
        packed, scales = kv_quantize(vectors, case["bits"])
        coded += [packed, scales]
        dense.append(dequantize(packed, scales, heads, width, case["bits"]).transpose(1, 2))
    rotation = None
    if case["rotated"] != "none" and width > 1:
        turned = width // 2 * 2 if case["rotated"] == "all" else 2
        rotation = tuple(torch.randn(case["seed"] % 2 * (batch - 1) + 1, tokens, turned) for _ in range(2))
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    mask: torch.Tensor | None = None
    if case["mask"] != "none":
        mask = (
            torch.rand(batch, all_heads if case["mask"] == "of heads" else 1, queries, tokens) < 0.7
        ) & seen
        mask[..., tokens - queries] = True
    added = torch.zeros(seen.shape if mask is None else mask.shape)
    added = added.masked_fill(~(seen if mask is None else mask), -torch.inf)
    if case["mask"] == "float":
        assert mask is not None
        added = added + torch.randn(added.shape)
        mask = added
    arguments = (query, *coded, *(rotation or (None, None)), mask, heads, case["bits"], 0.3)
    got = kv_attention(*arguments)
    expected = attention_in_float64(query, *dense, rotation, added, 0.3)
    assert got.shape == (batch, queries, all_heads, width)
    assert got.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((got.double() - expected).abs().max()) <= bound * float(dense[1].abs().max())


def arguments(bits: int = 4, **changes: Any) -> list[Any]:
    torch.manual_seed(0)
    keys, values = (kv_quantize(torch.randn(2, 7, 2, 8), bits) for _ in range(2))
    rotation = torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    given = {
        "query": torch.randn(2, 4, 3, 8),
        **{"keys": keys[0], "key_scales": keys[1], "values": values[0], "value_scales": values[1]},
        **{"cosines": rotation[0], "sines": rotation[1]},
        **{"mask": torch.ones(2, 1, 3, 7, dtype=torch.bool), "heads": 2, "bits": bits, "scaling": 0.5},
    }
    return list({**given, **changes}.values())


@pytest.mark.parametrize("bits", BITS)
def test_the_operators_are_well_defined(kernel: str, bits: int) -> None:
    torch.library.opcheck(torch.ops.compress.kv_quantize, (torch.randn(2, 3, 2, 5), bits))
    torch.library.opcheck(torch.ops.compress.kv_attention, arguments(bits))


WRONG: dict[str, dict[str, Any]] = {
    "codes of another width": {"keys": torch.zeros(2, 7, 3, dtype=torch.int32)},
    "codes of another dtype": {"values": torch.zeros(2, 7, 2, dtype=torch.int64)},
    "too few scales": {"key_scales": torch.ones(2, 6, 2, 1)},
    "scales of other heads": {"value_scales": torch.ones(2, 7, 3, 1)},
    "scales of another dtype": {"value_scales": torch.ones(2, 7, 2, 1).half()},
    "more queries than tokens": {"query": torch.randn(2, 4, 9, 8)},
    "queries of another width": {"query": torch.randn(2, 4, 3, 6)},
    "heads that do not divide": {"query": torch.randn(2, 5, 3, 8)},
    "cosines alone": {"sines": None},
    "too few cosines": {"cosines": torch.randn(1, 6, 8), "sines": torch.randn(1, 6, 8)},
    "an odd rotation": {"cosines": torch.randn(1, 7, 7), "sines": torch.randn(1, 7, 7)},
    "a mask of other tokens": {"mask": torch.ones(2, 1, 3, 6, dtype=torch.bool)},
    "a mask of another batch": {"mask": torch.ones(3, 1, 3, 7, dtype=torch.bool)},
    "bits": {"bits": 5},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(kernel: str, case: str) -> None:
    with pytest.raises(ValueError, match=r"shape|is|are|come|cannot|divide"):
        kv_attention(*arguments(**WRONG[case]))


def test_vectors_that_do_not_fit_are_refused(kernel: str) -> None:
    for vectors, bits in (
        (torch.randn(2, 3, 4), 4),
        (torch.ones(1, 1, 1, 4).int(), 4),
        (torch.randn(1, 1, 1, 4), 5),
    ):
        with pytest.raises(ValueError, match="There are no"):
            kv_quantize(vectors, bits)


def test_it_is_what_torch_computes(kernel: str) -> None:
    torch.manual_seed(0)
    (keys, key_scales), (values, value_scales) = (kv_quantize(torch.randn(2, 50, 3, 16), 8) for _ in range(2))
    query = torch.randn(2, 6, 1, 16)
    found = kv_attention(query, keys, key_scales, values, value_scales, None, None, None, 3, 8, 0.25)
    dense = [
        dequantize(codes, scales, 3, 16, 8).transpose(1, 2)
        for codes, scales in ((keys, key_scales), (values, value_scales))
    ]
    expected = F.scaled_dot_product_attention(query, *dense, scale=0.25, enable_gqa=True)
    assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_token_that_sees_none_gets_zeros(kernel: str, bits: int) -> None:
    given = arguments(bits)
    mask = given[7]
    mask[1, :, 0] = False  # as the padding on the left of a shorter prompt
    found = kv_attention(*given)
    assert bool((found[1, 0] == 0).all())
    assert torch.equal(kv_attention(*arguments(bits))[1, 1:], found[1, 1:])
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(kv_attention(*given[:7], added, *given[8:]), found)
    given[0][1, :, 0] = torch.nan
    assert bool(kv_attention(*arguments(bits, query=given[0]))[1, 0].isnan().all())  # what is wrong stays so
