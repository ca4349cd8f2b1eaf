"""kv_quantize and kv_attention of ``source/cache.cu`` against the reference, emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels.cache_ops import BITS
from compress.kernels.cuda import cache
from compress.kernels.reference import cache as reference
from tests.emulation.build import CUDA
from tests.emulation.emulator import SCHEDULES, Device, EmulationError, Kernels

SOURCE = CUDA / "cache.cu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    st.sampled_from(BITS),
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 6), st.integers(1, 70)),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@FEW
def test_codes_and_scales_are_those_of_the_reference(
    kernels: Kernels, schedule: str, bits: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(shape).mul_(3).to(dtype)
    vectors[0, 0, 0] = 0
    with Device(kernels, [vectors], schedule=schedule) as device:
        packed, scales, error = cache.quantize(device.library, vectors, bits, None)
    expected = reference.kv_quantize(vectors, bits)
    assert error == 0
    assert torch.equal(scales, expected[1])
    assert torch.equal(packed, expected[0])


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "shared": draw(st.sampled_from([1, 2, 3, 4])),
        "queries": draw(st.sampled_from([1, 1, 2, 5])),
        "before": draw(st.sampled_from([0, 3, 59, 63, 64, 150])),
        "width": draw(st.sampled_from([1, 5, 8, 24, 64, 67])),
        "bits": draw(st.sampled_from(BITS)),
        "per_head": draw(st.booleans()),
        "rotated": draw(st.sampled_from(["none", "all", "some"])),
        "mask": draw(st.sampled_from(["none", "bool", "float", "of heads"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "processors": draw(st.sampled_from([1, 8])),
        "seed": draw(st.integers(0, 2**31)),
    }


def arguments(case: dict[str, Any]) -> tuple[Any, ...]:
    """Those of `kv_attention` for a case."""
    torch.manual_seed(case["seed"])
    batch, heads, width, queries = case["batch"], case["heads"], case["width"], case["queries"]
    tokens, all_heads = queries + case["before"], heads * case["shared"]
    coded: list[torch.Tensor] = []
    for _ in range(2):
        vectors = torch.randn(batch, tokens, heads, width)
        vectors = vectors if case["per_head"] else vectors.flatten(-2).unsqueeze(-2)
        coded += reference.kv_quantize(vectors, case["bits"])
    rotation: tuple[torch.Tensor | None, ...] = (None, None)
    if case["rotated"] != "none" and width > 1:
        turned = width // 2 * 2 if case["rotated"] == "all" else 2
        shape = (case["seed"] % 2 * (batch - 1) + 1, tokens, turned)
        rotation = tuple(torch.randn(shape).to(case["dtype"]) for _ in range(2))
    mask: torch.Tensor | None = None
    if case["mask"] != "none":
        of_heads = all_heads if case["mask"] == "of heads" else 1
        mask = torch.rand(batch, of_heads, queries, tokens) < 0.7
        mask[..., tokens - queries] = True
        if case["mask"] == "float":
            mask = reference.added(mask) + torch.randn(mask.shape)
    query = torch.randn(batch, all_heads, queries, width).to(case["dtype"])
    return query, *coded, *rotation, mask, heads, case["bits"], 0.3


def attention(kernels: Kernels, given: tuple[Any, ...], processors: int, **setting: Any) -> torch.Tensor:
    inputs = [argument for argument in given if isinstance(argument, torch.Tensor)]
    with Device(kernels, inputs, **setting) as device:
        found, error = cache.attention(device.library, *given, None, processors)
    assert error == 0
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(cases())
@FEW
def test_attention_is_that_of_the_reference(kernels: Kernels, schedule: str, case: dict[str, Any]) -> None:
    given = arguments(case)
    found = attention(kernels, given, case["processors"], schedule=schedule)
    expected = reference.kv_attention(*given)
    assert found.dtype == expected.dtype == case["dtype"]
    assert found.shape == expected.shape
    bound = 1e-4 if case["dtype"] == torch.float32 else 1e-2
    assert float((found.float() - expected.float()).abs().max()) <= bound * max(
        1, float(expected.abs().max())
    )


@pytest.mark.parametrize("processors", [1, 8])
@pytest.mark.parametrize("shared", [1, 4])
def test_a_token_that_sees_none_gets_zeros(kernels: Kernels, shared: int, processors: int) -> None:
    case = {**LONG, "bits": 4, "queries": 2, "shared": shared, "mask": "bool", "dtype": torch.float32}
    given = arguments(case)
    given[7][:, :, 0] = False
    found = attention(kernels, given, processors)
    assert bool((found[:, 0] == 0).all())
    assert torch.allclose(found, reference.kv_attention(*given), atol=1e-4)


LONG = {
    **{"batch": 1, "heads": 2, "shared": 4, "queries": 1, "before": 199, "width": 64, "per_head": True},
    **{"rotated": "all", "mask": "none", "dtype": torch.float16, "processors": 2, "seed": 1},
}


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_read_once(kernels: Kernels, bits: int) -> None:
    given = arguments({**LONG, "bits": bits})
    keys, values = given[1], given[3]
    with Device(kernels, given[:7]) as device:
        cache.attention(device.library, *given, None, LONG["processors"])
    for codes in (keys, values):
        size = codes.numel() * codes.element_size()
        assert device.traffic(codes).read == size
        # Halves of a pair that share a sector ask for it twice; the first-level cache has it.
        assert device.traffic(codes).fetched <= (2 if codes is keys and bits == 4 else 1) * size


BUGS = {
    "missing barrier before the softmax": (
        "scores[r * TILE + t] = t < tokens ? dots[r] + masked(a, part, r, start + t) : -INFINITY;\n    }\n"
        "    __syncthreads();",
        "scores[r * TILE + t] = t < tokens ? dots[r] + masked(a, part, r, start + t) : -INFINITY;\n    }\n",
    ),
    "missing barrier after a tile": ("    }\n    __syncthreads();\n  }\n\n", "    }\n  }\n\n"),
    "barrier in a divergent branch": ("if (group < groups) {", "if (group < groups) {\n__syncthreads();"),
    "tail of the tokens": ("t = group; t < tokens;", "t = group; t <= tokens;"),
    "tail of the width": ("const int count = min(PIECE, width - i);", "const int count = PIECE;"),
    "wrong half of a pair": ("codes<BITS>(row, first + half_width + i", "codes<BITS>(row, first + i"),
    "sums not rescaled": ("total[r][e] *= factors[r]", "total[r][e] *= 1"),
}


ONE_KERNEL = {
    **{f"case {bits}: return attention_of<{bits}>(*attention, stream);": "" for bits in (2, 3, 8)},
    "if (rows == 1) return attention<BITS, 1>(a, stream);": "",
    "return rows <= 4 ? attention<BITS, 4>(a, stream) : attention<BITS, 8>(a, stream);": (
        "return rows <= 4 ? attention<BITS, 4>(a, stream) : cudaErrorInvalidValue;"
    ),
}
"""Leaves one kernel of attention, which is sooner compiled."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    right, wrong = BUGS[bug]
    kernels = Kernels(SOURCE, {**ONE_KERNEL, right: wrong})
    given = arguments({**LONG, "bits": 4, "width": 67, "rotated": "some", "dtype": torch.float32})
    try:
        found = attention(kernels, given, 1)
    except EmulationError:
        return
    assert not torch.allclose(found, reference.kv_attention(*given), atol=1e-3)
