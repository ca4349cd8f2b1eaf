"""Every backend of the packed linear operator against the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.errors import BadInput
from compress.kernels.codes.integer import quantize_weight
from compress.kernels.codes.nf4 import NF4Weight
from compress.kernels.codes.packing import BITS
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.linear import PackedLinear
from compress.kernels.layers.nf4_linear import NF4Linear
from compress.kernels.ops import backend_of, packed_linear
from compress.kernels.reference.ops import WEIGHTS_AT_ONCE

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def make(
    bits: int, symmetric: bool = True, out: int = 40, width: int = 96, group_size: int = 32, bias: bool = True
):
    generator = torch.Generator().manual_seed(0)
    q = quantize_weight(
        torch.randn(out, width, generator=generator), bits, group_size, symmetric, torch.bfloat16
    )
    return q, torch.randn(out, generator=generator) if bias else None


def arguments(bits: int, symmetric: bool, device: str, dtype: torch.dtype = torch.float32):
    q, bias = make(bits, symmetric)
    layer = PackedLinear.from_quantized(q, bias.to(dtype)).to(device)
    input = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return input, layer.packed, layer.scales, layer.zeros, None, layer.bias, bits, 32, 40, "floating"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_operator_is_well_defined(bits, symmetric, device):
    torch.library.opcheck(torch.ops.compress.packed_linear, arguments(bits, symmetric, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_it_multiplies_with_the_dequantized_weight(bits, symmetric, dtype, device):
    """Rounded to the dtype of the input, as stock loaders do; only the order of summing may differ."""
    given = arguments(bits, symmetric, device, dtype)
    weight = make(bits, symmetric)[0].dequantize().to(dtype)
    expected = F.linear(given[0].double(), weight.to(device).double(), given[5].double())
    got = packed_linear(*given)
    assert got.dtype == dtype
    assert got.device.type == device
    precision = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert float((got.double() - expected).abs().max()) <= precision * float(expected.abs().max())


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("width", [40, 72])
@pytest.mark.parametrize("bits", BITS)
def test_rows_that_end_inside_a_word_and_inside_a_block_of_rows(bits, width, group_size):
    out = WEIGHTS_AT_ONCE // width * 2 + 3
    q, _ = make(bits, out=out, width=width, group_size=group_size, bias=False)
    layer = PackedLinear.from_quantized(q)
    x = torch.randn(2, width)
    expected = x @ q.dequantize().t()
    assert float((layer(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_holds_the_weight_bit_for_bit(bits, symmetric):
    q, _ = make(bits, symmetric)
    layer = PackedLinear(96, 40, bits, 32, symmetric, bias=True, scale_dtype=torch.bfloat16)
    assert layer.packed.device.type == "meta"
    empty_bytes = layer.weight_bytes
    layer.fill(q)
    assert layer.quantized().same_as(q)
    assert layer.weight_bytes == empty_bytes == 40 * 96 * bits // 8 + 40 * 3 * (2 if symmetric else 3)


def test_layers_of_no_memory_have_shapes():
    layer = PackedLinear(96, 40, 3, 32, bias=True)
    assert layer(torch.empty(2, 7, 96, device="meta")).shape == (2, 7, 40)


def test_scales_keep_their_dtype_and_everything_moves():
    q, bias = make(4, symmetric=False)
    layer = PackedLinear.from_quantized(q, bias).to(torch.float16)
    assert layer.scales.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.float16
    assert layer.quantized().same_as(q)
    assert layer(torch.randn(2, 96, dtype=torch.float16)).dtype == torch.float16
    assert layer.to("meta").scales.device.type == "meta"


def test_a_layer_says_what_it_is():
    layer = PackedLinear.from_quantized(*make(3))
    assert repr(layer) == (
        "PackedLinear(in_features=96, out_features=40, bits=3, group_size=32, symmetric=True, bias=True)"
    )
    assert layer.kernel == backend_of("meta") == "reference"  # as long as its codes lie in rows
    assert list(layer.state_dict()) == ["bias"]  # how a weight is stored is known to the checkpoint only
    assert list(layer.parameters()) == []


def test_a_layer_refuses_what_it_was_not_made_for():
    q, _ = make(4)
    with pytest.raises(ValueError, match="was given"):
        PackedLinear(96, 40, 3, 32, bias=True).fill(q)
    with pytest.raises(ValueError, match="was given"):
        PackedLinear(96, 48, 4, 32).fill(q)
    with pytest.raises(BadInput, match="does not divide"):
        PackedLinear(96, 40, 4, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_an_embedding_gives_the_dequantized_rows(bits, symmetric, dtype, device):
    q, _ = make(bits, symmetric, out=41, width=40, group_size=8)
    embedding = PackedEmbedding(PackedLinear.from_quantized(q), dtype).to(device)
    for ids in (torch.tensor([[40, 0, 7], [7, 7, 1]]), torch.tensor(5)):
        expected = F.embedding(ids, q.dequantize().to(dtype))
        got = embedding(ids.to(device))
        assert got.device.type == device
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), expected)


def test_an_embedding_moves_with_the_head_that_is_its_table():
    q, _ = make(8, bias=False)
    model = torch.nn.Module()
    model.head = PackedLinear.from_quantized(q)
    model.embedding = PackedEmbedding(model.head, embed_scale=torch.tensor(8.0))
    model.to(torch.bfloat16)
    assert model.head is model.embedding.table
    assert model.head.scales.dtype == torch.bfloat16
    rows = q.dequantize().bfloat16()
    assert torch.equal(model.embedding(torch.arange(40)), rows * 8)
    assert (model.embedding.num_embeddings, model.embedding.embedding_dim) == (40, 96)
    assert model.to("meta").embedding(torch.empty(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, 96)
    assert model.state_dict() == {}


def test_rows_of_nf4_with_scales_that_are_quantized():
    out, width = 600, 100
    blocks = -(-out * width // 64)
    nested = (torch.rand(-(-blocks // 256)), torch.linspace(-1, 1, 256), torch.tensor([2.0]))
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    weight = NF4Weight(codes, absmax, torch.linspace(-1, 1, 16), torch.float32, nested)
    layer = NF4Linear(weight)
    assert layer.quantized().same_as(weight)
    dense = weight.dequantize()
    for rows in (slice(0, 8), slice(440, 560), slice(598, 600)):
        assert torch.equal(layer.dequantize_rows(rows), dense[rows])
