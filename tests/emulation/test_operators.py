"""What the operators do on a CUDA device: they start the kernels, or leave the work to plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.kernels import cache_ops, embedding_ops, ops
from compress.kernels.codes.packing import pack
from compress.kernels.reference import cache, embedding
from compress.kernels.reference import ops as reference
from tests.emulation.emulator import Device

Use = Callable[[str], Device]


def linear(group: int = 32, width: int = 64) -> tuple[Any, ...]:
    packed = pack(torch.randint(16, (24, width), dtype=torch.uint8), 4)
    scales = torch.rand(24, width // group).half()
    return packed, scales, None, None, None, 4, group, 24, "floating"


def test_packed_linear(emulate: Use) -> None:
    device, given = emulate("linear.cu"), linear()
    input = torch.randn(2, 64).half()
    found = ops._packed_linear_cuda(input, *given)
    assert torch.allclose(found.float(), reference.packed_linear(input.float(), *given), rtol=1e-2, atol=1e-2)
    assert device.counts.multiply_adds > 0


@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 32), (torch.float16, 16)])
def test_what_kernels_do_not_take_is_left_to_the_reference(
    emulate: Use, dtype: torch.dtype, group: int
) -> None:
    device, given, input = emulate("linear.cu"), linear(group), torch.randn(2, 64).to(dtype)
    assert torch.equal(ops._packed_linear_cuda(input, *given), reference.packed_linear(input, *given))
    assert device.counts.multiply_adds == 0


def test_packed_embedding(emulate: Use) -> None:
    emulate("linear.cu")
    packed, scales, *_ = linear()
    given = (torch.tensor([3, 0, 23]), packed, scales, None, 4, 32, 24, 64)
    assert torch.equal(embedding_ops._packed_embedding_cuda(*given), embedding.packed_embedding(*given))


def test_keys_and_values(emulate: Use) -> None:
    emulate("cache.cu")
    coded: list[torch.Tensor] = []
    for _ in range(2):
        vectors = torch.randn(1, 5, 2, 16)
        found = cache_ops._kv_quantize_cuda(vectors, 8)
        assert all(torch.equal(*pair) for pair in zip(found, cache.kv_quantize(vectors, 8)))
        coded += found
    given = (torch.randn(1, 4, 1, 16), *coded, None, None, None, 2, 8, 0.25)
    assert torch.allclose(cache_ops._kv_attention_cuda(*given), cache.kv_attention(*given), atol=1e-5)
