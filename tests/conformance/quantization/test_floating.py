"""Floating formats against the compressed-tensors library, and against the definition of the formats."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.kernels.codes.floating import (
    E2M1,
    GROUP_SIZES,
    FloatWeight,
    pack_nibbles,
    quantize_float,
    real_scales,
    unpack_nibbles,
)

OUT, WIDTH = 24, 96
SCHEMES = {"fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
COMPRESSORS = {
    "fp8": FloatQuantizationCompressor,
    "mxfp4": MXFP4PackedCompressor,
    "nvfp4": NVFP4PackedCompressor,
}


def a_weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator) * 0.05
    weight[3, 7], weight[5] = 2.5, weight[5] * 1e-3
    weight[8, :32] = 0
    middles = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between codes, where 6 is the last
    weight[10, :32] = torch.cat((middles, -middles, middles, -middles)) / 64
    return weight


def library(weight: torch.Tensor, type: str) -> dict[str, torch.Tensor]:
    """The scales that llm-compressor computes, before they are compressed."""
    scheme = preset_name_to_scheme(SCHEMES[type], ["Linear"]).weights
    grouped = weight.view(OUT, -1, WIDTH if type == "fp8" else GROUP_SIZES[type])
    low, high = grouped.amin(-1), grouped.amax(-1)
    found = {}
    if type == "nvfp4":
        found["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scales, _ = calculate_qparams(low, high, scheme, found.get("weight_global_scale"))
    return found | {"weight_scale": scales}


@pytest.mark.parametrize("type", SCHEMES)
def test_the_library_writes_the_same_bits_and_reads_ours(type: str) -> None:
    weight, scheme = a_weight(), preset_name_to_scheme(SCHEMES[type], ["Linear"])
    ours = quantize_float(weight, type, torch.float32)
    state = {"weight": weight.clone(), "weight_scale": real_scales(ours.scales, None)}
    if ours.global_scale is not None:
        state["weight_global_scale"] = ours.global_scale
    theirs = COMPRESSORS[type].compress(state, scheme)

    codes = theirs["weight"] if type == "fp8" else unpack_nibbles(theirs["weight_packed"])
    assert FloatWeight(type, codes, theirs["weight_scale"], ours.global_scale).same_as(ours)
    if type != "fp8":
        assert torch.equal(theirs["weight_packed"], pack_nibbles(ours.codes))
    again = COMPRESSORS[type].decompress(theirs, scheme)["weight"]
    assert torch.equal(again, ours.dequantize().to(again.dtype))


@pytest.mark.parametrize("type", ["fp8", "nvfp4"])
def test_scales_are_the_librarys(type: str) -> None:
    weight = a_weight()
    ours, theirs = quantize_float(weight, type, torch.float32), library(weight, type)
    if type == "nvfp4":
        assert torch.equal(ours.global_scale, theirs["weight_global_scale"])
    expected = theirs["weight_scale"].view(ours.scales.shape)
    zero = weight.view(*ours.scales.shape, -1).abs().amax(-1) == 0  # any scale will do there
    assert bool(zero.any()) == (type == "nvfp4")
    assert torch.equal(ours.scales.float()[~zero], expected[~zero])


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_scales_of_mxfp4_are_those_of_the_rules(rounding: str) -> None:
    weight = a_weight()
    weight[0, :32] = torch.cat((torch.tensor([0.75]), torch.zeros(31)))  # 6 · 2^-3, no need for more
    weight[1, :32] = torch.cat((torch.tensor([0.5]), torch.zeros(31)))  # a power of two
    weight[2, :32] = torch.cat((torch.tensor([0.76]), torch.zeros(31)))
    found = real_scales(quantize_float(weight, "mxfp4", torch.float32, rounding).scales, None)
    for row in range(OUT):
        for block, values in enumerate(weight[row].double().view(-1, 32)):
            largest = float(values.abs().max())
            if largest:
                floor = 2.0 ** (math.floor(math.log2(largest)) - 2)
                expected = floor if rounding == "floor" or largest <= 6 * floor else 2 * floor
                assert found[row, block].item() == expected
    assert found[0, 0] == found[1, 0] == 0.125
    assert found[2, 0].item() == (0.125 if rounding == "floor" else 0.25)


def test_every_exponent_is_exact() -> None:
    stored = torch.arange(1, 255, dtype=torch.uint8)
    expected = [math.ldexp(1.0, number - 127) for number in range(1, 255)]
    assert real_scales(stored, None).tolist() == expected


@settings(max_examples=40)
@given(
    type=st.sampled_from(list(SCHEMES)),
    rounding=st.sampled_from(["floor", "ceil"]),
    out=st.integers(1, 4),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 999),
)
def test_codes_are_nearest(type, rounding, out, blocks, scale, seed) -> None:
    weight = scale * torch.randn(out, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    found = quantize_float(weight, type, torch.float32, rounding)
    numbers = E2M1.double()
    if type == "fp8":
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        numbers = numbers[numbers.isfinite()]
    steps = real_scales(found.scales, found.global_scale).double()
    steps = steps.repeat_interleave(weight.shape[1] // steps.shape[1], 1)
    best = (steps[..., None] * numbers - weight.double()[..., None]).abs().amin(-1)
    error = (found.dequantize().double() - weight.double()).abs()
    assert bool((error <= best + 1e-4 * steps).all())
    if type != "mxfp4" or rounding == "ceil":  # nothing is cut
        largest = {"fp8": 448.0 * (1 + 2**-4), "mxfp4": 6.0, "nvfp4": 6.0 * (1 + 2**-4)}[type]
        assert bool((weight.double().abs() <= largest * steps * (1 + 1e-6)).all())


@pytest.mark.parametrize("type", SCHEMES)
def test_bad_weights_are_refused(type: str) -> None:
    weight = a_weight()
    weight[2, 2] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        quantize_float(weight, type, torch.float32, name="w")
    if type != "fp8":
        with pytest.raises(BadInput, match="does not divide"):
            quantize_float(a_weight()[:, :40], type, torch.float32, name="w")
