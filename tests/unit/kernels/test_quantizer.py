"""The integer quantizer: its grid, its error bounds, and the weights it must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.kernels.codes.integer import quantize_weight
from compress.kernels.codes.packing import BITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([8, 24, -1]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_errors_are_at_most_half_a_step_inside_the_grid(
    bits, group_size, symmetric, dtype, scale, shift, seed
):
    weight = (random_weight(3, 48, seed) + shift) * scale
    q = quantize_weight(weight, bits, group_size, symmetric, dtype)
    groups = 1 if group_size == -1 else 48 // group_size
    assert q.shape == (3, 48)
    assert q.scales.shape == q.zeros.shape == (3, groups)
    assert q.scales.dtype == dtype
    assert q.codes.dtype == q.zeros.dtype == torch.uint8
    top = 2**bits - 1
    assert int(q.codes.max()) <= top
    assert int(q.zeros.max()) <= top
    grouped, step = weight.view(3, groups, -1).double(), q.scales.double().unsqueeze(-1)
    zeros = q.zeros.double().unsqueeze(-1)
    exact = grouped / step + zeros
    error = (q.dequantize().view_as(grouped).double() - grouped).abs() / step.abs()
    assert bool((error[(exact > 0) & (exact < top)] <= 0.5 + 1e-5).all())
    # Outside the grid: asymmetric only by the rounding of s and z, symmetric up to the missing level.
    assert float(error.max()) <= (1.0 if symmetric else 0.5) + top * 2.0**-7


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_is_turned_to_the_larger_side(bits):
    weight = torch.tensor([[1.0, -0.3, 0.2, 0.7], [-1.0, 0.3, -0.2, -0.7]])
    q = quantize_weight(weight, bits, -1, True, torch.float32)
    assert q.scales[:, 0].tolist() == [-(2.0 ** (1 - bits)), 2.0 ** (1 - bits)]
    assert q.codes[:, 0].tolist() == [0, 0]
    assert q.dequantize()[:, 0].tolist() == [1.0, -1.0]
    assert q.zeros.unique().tolist() == [2 ** (bits - 1)]


def test_two_symmetric_bits_use_all_four_levels():
    q = quantize_weight(random_weight(64, 64), 2, 32, True, torch.float16)
    assert q.codes.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits_and_with_smaller_groups(symmetric):
    weight = random_weight(64, 128)

    def error(bits: int, group_size: int) -> float:
        return float(
            (
                quantize_weight(weight, bits, group_size, symmetric, torch.bfloat16).dequantize() - weight
            ).norm()
        )

    by_bits = [error(bits, 32) for bits in BITS]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(3, size) for size in (16, 32, 64, -1)]
    assert by_group == sorted(by_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_stay_zero(symmetric, dtype):
    weight = random_weight(4, 32)
    weight[1, :16] = 0
    weight[2] = 0
    q = quantize_weight(weight, 4, 16, symmetric, dtype)
    assert bool((q.scales != 0).all())
    assert torch.equal(q.dequantize()[1, :16], torch.zeros(16))
    assert torch.equal(q.dequantize()[2], torch.zeros(32))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_groups_keep_zero_on_the_grid(sign):
    weight = sign * (1 + random_weight(2, 16).abs())
    q = quantize_weight(weight, 4, -1, False, torch.float32)
    assert q.zeros.unique().tolist() == [0 if sign > 0 else 15]
    assert float((q.dequantize() - weight).abs().max()) <= float(q.scales.max()) * 0.501


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_too_small_to_store_are_not_zero(dtype, symmetric):
    tiny = 1e-8 if dtype == torch.float16 else 1e-38
    weight = torch.full((2, 8), tiny)
    weight[:, ::2] *= -1
    q = quantize_weight(weight, 8, -1, symmetric, dtype)
    assert bool((q.scales != 0).all())
    assert bool(torch.isfinite(q.dequantize()).all())
    assert float((q.dequantize() - weight).abs().max()) <= tiny


def test_a_scale_too_large_to_store_is_refused_and_fits_a_wider_dtype():
    weight = random_weight(2, 32) * 1e7
    with pytest.raises(BadInput, match=r"'model\.up'.*too large for float16"):
        quantize_weight(weight, 4, -1, True, torch.float16, "model.up")
    q = quantize_weight(weight, 8, -1, True, torch.bfloat16)
    assert float((q.dequantize() - weight).norm() / weight.norm()) < 0.02


def test_the_largest_floats_do_not_overflow():
    weight = torch.tensor([[3e38, -3e38, 1e38, 0.0]])
    for symmetric in (True, False):
        q = quantize_weight(weight, 8, -1, symmetric, torch.float32)
        assert float(((q.dequantize() - weight) / 3e38).abs().max()) < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_weights_are_refused_by_name(value):
    weight = random_weight(2, 8)
    weight[1, 3] = value
    with pytest.raises(BadInput, match=r"'model\.layers\.0\.mlp\.up_proj'.*NaN or infinity"):
        quantize_weight(weight, 4, 8, True, torch.float16, "model.layers.0.mlp.up_proj")


def test_a_group_size_that_does_not_divide_names_sizes_that_do():
    with pytest.raises(
        BadInput, match=r"128 does not divide the input dimension 576 of 'q_proj'; use 16, 32, 64"
    ):
        quantize_weight(random_weight(2, 576), 4, 128, True, torch.float16, "q_proj")
    with pytest.raises(BadInput, match="use 9, 15, 45 or channel"):
        quantize_weight(random_weight(2, 45), 4, 32, True, torch.float16, "q_proj")


def test_the_weight_is_left_alone():
    weight = random_weight(4, 16)
    before = weight.clone()
    quantize_weight(weight, 4, 8, False, torch.float16)
    assert torch.equal(weight, before)
    by_bfloat16 = quantize_weight(weight.bfloat16(), 4, 8, False, torch.float16)
    assert by_bfloat16.same_as(quantize_weight(weight.bfloat16().float(), 4, 8, False, torch.float16))
