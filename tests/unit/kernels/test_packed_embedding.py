"""Rows of packed tables: every path of this machine against the dequantized table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compress.kernels.codes.integer import quantize_weight
from compress.kernels.cpu.library import AUTO, paths, use
from compress.kernels.embedding_ops import packed_embedding
from compress.kernels.layers.linear import PackedLinear


@pytest.fixture(params=["reference", *(f"cpu:{path}" for path in paths())])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(AUTO)


def table(bits: int, group_size: int, symmetric: bool, strips: bool) -> PackedLinear:
    torch.manual_seed(bits)
    layer = PackedLinear.from_quantized(
        quantize_weight(torch.randn(37, 72), bits, group_size, symmetric, torch.float16)
    )
    if strips:
        layer.in_strips = layer.to_strips()
    return layer


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 24])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows(kernel: str, bits: int, group_size: int, symmetric: bool, strips: bool) -> None:
    layer = table(bits, group_size, symmetric, strips)
    dense = layer.quantized().dequantize()
    for rows in (
        torch.tensor([36, 0, 15, 16, 0]),
        torch.arange(37).int(),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.allclose(layer.rows_of(rows), dense[rows.long()], rtol=1e-6, atol=1e-7)


def test_the_operator_is_well_defined(kernel: str) -> None:
    for strips in (False, True):
        layer = table(3, 24, False, strips)
        given = (torch.tensor([[3], [36]]), layer.packed, layer.scales, layer.zeros, 3, 24, 37, 72)
        assert packed_embedding(*given).shape == (2, 1, 72)
        torch.library.opcheck(torch.ops.compress.packed_embedding, given)


def test_what_does_not_fit_is_refused(kernel: str) -> None:
    layer = table(4, 24, False, True)
    given = (layer.packed, layer.scales, layer.zeros, 4, 24, 37, 72)
    for rows in ([37], [-1], [0, 2**40]):
        with pytest.raises(IndexError, match="37 rows"):
            packed_embedding(torch.tensor(rows), *given)
    with pytest.raises(ValueError, match="whole numbers"):
        packed_embedding(torch.tensor([1.0]), *given)
    with pytest.raises(ValueError, match="shape"):
        packed_embedding(torch.tensor([1]), layer.packed[:1], *given[1:])
