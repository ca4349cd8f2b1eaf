"""Round-to-nearest against its equations in float64, and against the compressed-tensors library."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.kernels.codes.packing import BITS
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.table import format_of

OUT, WIDTH, GROUP = 32, 96, 32
NAME = "model.layers.0.mlp.up_proj"


def a_weight(kind: str) -> torch.Tensor:
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)) * 0.05
    return {
        "normal": weight,
        "shifted": weight + 0.08,
        "outlier": weight.index_fill(1, torch.tensor(7), 0.9),
    }[kind]


def by_the_equations(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, zero points and dequantized weight (float64), group by group in Python floats."""
    out, width = weight.shape
    size = width if group_size == -1 else group_size
    top, half = 2**bits - 1, 2 ** (bits - 1)
    codes = torch.zeros(out, width, dtype=torch.uint8)
    scales = torch.zeros(out, width // size, dtype=torch.float64)
    zeros = torch.zeros(out, width // size, dtype=torch.uint8)
    for row in range(out):
        for group in range(width // size):
            values = weight[row, group * size : (group + 1) * size].tolist()
            low, high = min(*values, 0.0), max(*values, 0.0)
            s = -max(values, key=abs) / half if symmetric else (high - low) / top
            s = torch.tensor(s, dtype=torch.float64).to(scale_dtype).item()
            z = half if symmetric else min(max(round(-low / s), 0), top)
            scales[row, group], zeros[row, group] = s, z
            for position, value in enumerate(values):
                codes[row, group * size + position] = min(max(round(value / s) + z, 0), top)
    spread = [tensor.double().repeat_interleave(size, dim=1) for tensor in (scales, zeros)]
    return codes, scales, zeros, spread[0] * (codes.double() - spread[1])


@pytest.mark.parametrize("kind", ["normal", "shifted", "outlier"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_equations(bits, group_size, symmetric, scale_dtype, kind):
    weight = a_weight(kind)
    codes, scales, zeros, expected = by_the_equations(weight, bits, group_size, symmetric, scale_dtype)
    got = quantize_weight(weight, bits, group_size, symmetric, scale_dtype)
    assert torch.equal(got.scales.double(), scales)
    assert torch.equal(got.zeros, zeros)
    # float32 division may fall on the other side of a tie, which is no worse.
    different = got.codes != codes
    assert int(different.sum()) <= 2
    step = scales.abs().repeat_interleave(WIDTH // scales.shape[1], dim=1)
    error, best = ((x.double() - weight.double()).abs() for x in (got.dequantize(), expected))
    assert bool((error <= best + 1e-6 * step).all())
    # s (q − z) of these scales has at most 20 bits, so float32 is exact.
    assert torch.equal(got.dequantize().double()[~different], expected[~different])


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits(symmetric):
    for kind in ("normal", "shifted", "outlier"):
        weight = a_weight(kind)
        errors = [
            float(
                (quantize_weight(weight, bits, GROUP, symmetric, torch.float16).dequantize() - weight).norm()
            )
            for bits in BITS
        ]
        assert all(finer < coarser for coarser, finer in pairwise(errors))


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_error_is_below_the_conventional_scale(bits):
    """s = max|w| / (2^(b−1) − ½) is what compressed-tensors uses."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    s = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    usual = (weight / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s
    ours = quantize_weight(weight, bits, -1, True, torch.float32).dequantize()
    assert float((ours - weight).norm()) < float((usual - weight).norm())


def library_scheme(form: CompressedTensorsFormat) -> QuantizationScheme:
    config = form.quantization_config([NAME], [], ["lm_head"])
    config.pop("dequantize", None)  # transformers' own
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("bits", BITS)
def test_the_compressed_tensors_library_reads_ours_and_writes_the_same_bits(
    bits, group_size, symmetric, dtype
):
    form = CompressedTensorsFormat(bits, group_size, symmetric)
    weight = quantize_weight(a_weight("shifted"), bits, group_size, symmetric, form.scale_dtype(dtype))
    ours = {name.removeprefix(f"{NAME}."): tensor for name, tensor in form.tensors(NAME, weight).items()}
    scheme = library_scheme(form)

    read = PackedQuantizationCompressor.decompress(ours, scheme)
    assert torch.equal(read["weight"], weight.dequantize().to(weight.scales.dtype))

    half = 2 ** (bits - 1)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scales.float()}
    if not symmetric:
        state["weight_zero_point"] = (weight.zeros.int() - half).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert theirs.keys() == ours.keys()
    for leaf in ours.keys() - {"weight_scale"}:
        assert torch.equal(theirs[leaf], ours[leaf]), leaf

    theirs["weight_scale"] = weight.scales
    stored = {f"{NAME}.{leaf}": tensor for leaf, tensor in theirs.items()}
    again = format_of(form.quantization_config([NAME])).read(NAME, stored.__getitem__)
    assert again.same_as(weight)


def gptq_by_hand(tensors: dict[str, torch.Tensor], bits: int, version: int) -> list[list[Fraction]]:
    """ŵ[out][in] = s (q − z) from the words, as the layout is described for GPTQ checkpoints."""

    def field(column: list[int], index: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * position) for position, word in enumerate(column))
        return (stream >> (bits * index)) & (2**bits - 1)

    qweight, qzeros, scales = (tensors[f"{NAME}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    columns, rows = qweight.t().tolist(), qzeros.tolist()
    groups = tensors[f"{NAME}.g_idx"].tolist()
    return [
        [
            Fraction(scales[g, o].item()) * (field(columns[o], i) - field(rows[g], o) - (version == 1))
            for i, g in enumerate(groups)
        ]
        for o in range(len(columns))
    ]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("bits", GPTQFormat.widths)
def test_gptq_tensors_mean_what_the_layout_says(bits, group_size, symmetric):
    form = GPTQFormat(bits, group_size, symmetric)
    weight: QuantizedWeight = quantize_weight(a_weight("shifted"), bits, group_size, symmetric, torch.float16)
    expected = gptq_by_hand(form.tensors(NAME, weight), bits, form.version)
    got = weight.dequantize()
    assert all(
        math.isclose(got[o, i].item(), float(expected[o][i]), rel_tol=1e-7)
        for o in range(OUT)
        for i in range(WIDTH)
    )
