"""Layers whose codes lie in strips: the same weight, the same products, the same bytes in a checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.kernels.codes.floating import quantize_float
from compress.kernels.codes.int8 import Int8Weight
from compress.kernels.codes.integer import quantize_weight
from compress.kernels.codes.nf4 import BLOCK_SIZE, NF4Weight
from compress.kernels.cpu.library import kernel_name, use
from compress.kernels.layers.base import CodedLinear
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.float_linear import FloatLinear
from compress.kernels.layers.int8_linear import Int8Linear
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.kernels.layers.nf4_linear import NF4Linear

OUT, WIDTH = 37, 64


def integer(bits: int, symmetric: bool = False, kind: type[PackedLinear] = PackedLinear) -> PackedLinear:
    weight = quantize_weight(torch.randn(OUT, WIDTH), bits, 32, symmetric, torch.float16)
    return kind.from_quantized(weight, torch.randn(OUT))


def token_quantized(activation_bits: int) -> PackedLinear:
    layer = integer(4, kind=TokenQuantizedLinear)
    layer.activation_bits = activation_bits
    return layer


def nf4() -> NF4Linear:
    levels = torch.linspace(-1, 1, 16) ** 3
    codes = torch.randint(0, 16, (OUT, WIDTH), dtype=torch.uint8)
    return NF4Linear(NF4Weight(codes, torch.rand(OUT * WIDTH // BLOCK_SIZE), levels, torch.float32))


def int8(threshold: float = 1.5) -> Int8Linear:
    codes = torch.randint(-127, 128, (OUT, WIDTH), dtype=torch.int8)
    return Int8Linear(Int8Weight(codes, torch.rand(OUT), threshold), torch.randn(OUT))


LAYERS: dict[str, Callable[[], CodedLinear]] = {
    **{f"{bits} bits": lambda bits=bits: integer(bits) for bits in range(2, 9)},
    "symmetric": lambda: integer(4, symmetric=True),
    "int8 tokens": lambda: token_quantized(8),
    "4-bit tokens": lambda: token_quantized(4),
    "fp8": lambda: FloatLinear(quantize_float(torch.randn(OUT, WIDTH), "fp8", torch.bfloat16)),
    "mxfp4": lambda: FloatLinear(quantize_float(torch.randn(OUT, WIDTH), "mxfp4", torch.bfloat16)),
    "nvfp4": lambda: FloatLinear(quantize_float(torch.randn(OUT, WIDTH), "nvfp4", torch.bfloat16)),
    "nf4": nf4,
    "int8": int8,
}


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    use("cpu")
    yield
    use("auto")


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> CodedLinear:
    return LAYERS[request.param]()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5])
def test_products_are_those_of_rows(layer: CodedLinear, dtype: torch.dtype, count: int) -> None:
    layer.to(dtype)
    input = torch.randn(2, count, WIDTH, dtype=dtype)
    expected, before = layer(input), layer.quantized()
    layer.arrange()
    assert layer.in_strips
    assert layer.kernel.startswith(kernel_name())
    got = layer(input)
    assert got.dtype == dtype
    assert difference(got, expected) < 12 * torch.finfo(dtype).eps
    assert layer.quantized().same_as(before)


def test_the_gradient_is_that_of_rows(layer: CodedLinear) -> None:
    input = torch.randn(3, WIDTH, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(input).sum(), input)
    layer.arrange()
    (got,) = torch.autograd.grad(layer(input).sum(), input)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_casts_keep_the_weight(layer: CodedLinear, copied: Callable[[Any], Any]) -> None:
    before = layer.quantized()
    layer.arrange()
    input = torch.randn(1, WIDTH)
    expected = layer(input)
    other = copied(layer)
    assert torch.equal(other(input), expected)
    other.to(torch.bfloat16)
    assert other.in_strips
    assert other.quantized().same_as(before)
    assert not other.to("meta").in_strips  # strips are for the CPU


def test_rows_of_a_weight_in_strips(layer: CodedLinear) -> None:
    dense = layer.dequantize_rows(slice(0, OUT))
    layer.arrange()
    for start, stop in ((0, OUT), (3, 20), (16, 32), (36, 37)):
        assert torch.equal(layer.dequantize_rows(slice(start, stop)), dense[start:stop])


@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), out=st.integers(1, 40), groups=st.integers(1, 4),
    group_size=st.integers(1, 40), rows=st.integers(1, 9), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40)
def test_any_shape(
    bits: int, symmetric: bool, out: int, groups: int, group_size: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, groups * group_size, generator=generator)
    layer = PackedLinear.from_quantized(quantize_weight(weight, bits, group_size, symmetric, torch.float32))
    input = torch.randn(rows, groups * group_size, generator=generator)
    expected = input.double() @ layer.quantized().dequantize().double().T
    layer.arrange()
    assert float((layer(input) - expected).abs().max()) <= 1e-5 * float(
        (input.double().abs() @ layer.quantized().dequantize().double().abs().T).max()
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_embedding_over_a_table_in_strips(bits: int) -> None:
    table = integer(bits)
    embedding, tokens = PackedEmbedding(table), torch.tensor([[5, 0], [36, 5]])
    expected = embedding(tokens)
    table.arrange()
    assert torch.equal(embedding(tokens), expected)


def test_outliers_of_llm_int8_are_multiplied_as_they_are() -> None:
    layer, input = int8(threshold=2.0), torch.randn(4, WIDTH)
    input[1, 7], input[2, 30] = 40.0, -30.0
    expected = layer(input)
    layer.arrange()
    assert difference(layer(input), expected) < 1e-6


def test_without_a_kernel_nothing_is_arranged() -> None:
    use("reference")
    layer = integer(4)
    layer.arrange()
    assert not layer.in_strips
    assert layer.kernel == "reference"


def test_strips_still_multiply_where_the_kernels_are_gone() -> None:
    layer, input = integer(4), torch.randn(3, WIDTH)
    expected = layer(input)
    layer.arrange()
    use("reference")
    assert difference(layer(input), expected) < 1e-6


def test_wrong_shapes_are_errors_before_native_code() -> None:
    layer = integer(4)
    layer.arrange()
    with pytest.raises(ValueError, match="'packed' has the shape"):
        layer(torch.randn(1, WIDTH // 2))
    layer.scales = layer.scales[:1]
    with pytest.raises(ValueError, match="'scales' has the shape"):
        layer(torch.randn(1, WIDTH))


def test_a_bias_may_be_any_view() -> None:
    weight = quantize_weight(torch.randn(OUT, WIDTH), 4, 32, True, torch.float16)
    for bias in (torch.randn(OUT, 2)[:, 1], torch.ones(1).expand(OUT)):
        layer, input = PackedLinear.from_quantized(weight, bias), torch.randn(3, WIDTH)
        expected = layer(input)
        layer.arrange()
        assert difference(layer(input), expected) < 1e-6


def test_the_default_dtype_does_not_matter(layer: CodedLinear) -> None:
    input, other = torch.randn(3, WIDTH), copy.deepcopy(layer)
    other.arrange()
    expected = other(input)
    torch.set_default_dtype(torch.float64)
    try:
        layer.arrange()
        got = layer(input)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
