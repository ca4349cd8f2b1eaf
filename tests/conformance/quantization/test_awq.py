"""AWQ restated token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.engine.stream import Seen
from compress.kernels.codes.integer import quantize_weight
from compress.quantization.awq import Grid, Inputs, choose_scales, clipped
from compress.quantization.parts.folding import Fold
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat

WIDTH, TOKENS, SIZE = 64, 300, 16
GRIDS = [(2, False), (3, True), (4, False)]


def problem(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Two weights that read the same input, and tokens some of whose channels are large."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs *= torch.exp(1.5 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    inputs[:, 7] = 0  # and one that never comes
    weights = {name: torch.randn(rows, WIDTH, generator=generator) for name, rows in (("a", 12), ("b", 20))}
    return weights, inputs


def seen(inputs: Tensor) -> Inputs:
    """In two windows, the second of them padded with what must not count."""
    found, half = Inputs(), TOKENS // 2
    windows = torch.full((2, half + 10, WIDTH), 1e3, dtype=torch.float64)
    mask = torch.zeros(2, half + 10, dtype=torch.bool)
    for number, at in enumerate((0, 5)):
        windows[number, at : at + half] = inputs[number * half : (number + 1) * half]
        mask[number, at : at + half] = True
    found.add(Seen(windows[:1].float(), windows[:1], mask[:1], 0))
    found.add(Seen(windows[1:].float(), windows[1:], mask[1:], 1))
    return found


def restated_scales(weights: dict[str, Tensor], inputs: Tensor, groups: Tensor, form: Format) -> Tensor:
    magnitude = inputs.abs().mean(0)
    magnitude = torch.stack([magnitude[groups == unit].mean() for unit in range(int(groups.max()) + 1)])
    magnitude = (magnitude / magnitude.mean()).clamp(min=1e-4)
    results = []
    for step in range(20):
        s = magnitude ** (step / 19)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights.values():
            scaled = (weight * s[groups]).float()
            rounded = quantize_weight(scaled, form.bits, form.group_size, form.symmetric, torch.float32)
            error += float((inputs @ (rounded.dequantize() / s[groups] - weight).T).square().sum())
        results.append((error, s))
    return min(results, key=lambda result: result[0])[1]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "grouped-query"])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_scales(bits: int, symmetric: bool, shared: bool) -> None:
    weights, inputs = problem(bits)
    grid = Grid(CompressedTensorsFormat(bits, SIZE, symmetric), torch.float32, "w")
    units = torch.arange(WIDTH)
    if shared:  # two value heads of 8 channels, each for four query heads
        units = units.view(2, 4, 8)[:, :1].expand(2, 4, 8).flatten() % 8 + 8 * (units // 32)
    where = Fold("v", torch.arange(int(units.max()) + 1), units)
    found = choose_scales(weights, dict.fromkeys(weights, grid), seen(inputs), where)

    expected = restated_scales(weights, inputs, units, grid.form)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float(expected.max() / expected.min()) > 1.5  # and it is not that of alpha = 0


@pytest.mark.parametrize("size", [SIZE, -1])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_clipping(bits: int, symmetric: bool, size: int) -> None:
    weights, inputs = problem(10 + bits)
    weight, width = weights["a"], WIDTH if size == -1 else size
    found = clipped(
        weight, seen(inputs).gram, Grid(CompressedTensorsFormat(bits, size, symmetric), torch.float32, "w")
    )

    shares = set()
    for row in range(len(weight)):
        for group in range(WIDTH // width):
            part = slice(group * width, (group + 1) * width)
            values = weight[row, part]
            results = []
            for step in range(10):
                share = 1 - step / 20
                limit = share * float(values.abs().max())
                cut = values * share if symmetric else values.clamp(-limit, limit)
                grid = quantize_weight(cut[None], bits, -1, symmetric, torch.float32)
                scale, zero = grid.scales.item(), grid.zeros.item()
                codes = ((values.double() / scale).round() + zero).clamp(0, 2**bits - 1)
                error = (inputs[:, part] @ (scale * (codes - zero) - values)).square().sum()
                results.append((float(error), codes, scale, zero, share))
            _, codes, scale, zero, share = min(results, key=lambda result: result[0])
            assert torch.equal(found.codes[row, part].double(), codes)
            assert found.scales[row, group].item() == pytest.approx(scale, rel=1e-6)
            assert found.zeros[row, group].item() == zero
            shares.add(share)
    assert len(shares) > 2


def test_dividing_inputs_is_as_if_they_had_come_so() -> None:
    _, inputs = problem(0)
    scales = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5
    found, expected = seen(inputs), seen(inputs / scales)
    found.divide(scales)
    assert float((found.gram - expected.gram).abs().max()) < 1e-6 * float(expected.gram.abs().max())
    assert torch.allclose(found.magnitude, expected.magnitude, rtol=1e-5)
