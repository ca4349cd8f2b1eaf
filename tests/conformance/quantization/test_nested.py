"""Nested codes against the method's equations in float64, one weight at a time, with explicit inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels.codes.integer import quantize_weight
from compress.kernels.layers.stacked import PlaneStack, StackBlock
from compress.quantization.gptq import GPTQ
from compress.quantization.nested import FRACTIONS, choose_scales, nested_codes, planes, value
from compress.quantization.parts.columns import round_by_columns
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat

WIDTH, OUT, TOKENS, SIZE = 48, 6, 200, 16


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the X^T X of inputs whose columns hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(OUT, WIDTH, generator=generator), inputs.T @ inputs


def stands(code: int, width: int) -> float:
    """sum_j 2^-j S_j, literally."""
    return sum((1 if code >> (width - 1 - j) & 1 else -1) * 2.0**-j for j in range(width))


def restated(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, damping: float) -> Tensor:
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(WIDTH)
    columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    joint = min(3, bits)
    for row in range(len(weight)):
        work = {width: weight[row].double().clone() for width in range(2, bits + 1)}
        left = list(columns)
        for column in columns:
            s = float(scales[row, column // SIZE])
            wanted = {width: float(work[width][column]) for width in work}
            losses = []
            for code in range(2**joint):
                loss = 0.0
                for width in work:
                    if width <= joint:
                        off = wanted[width] - s * stands(code >> (joint - width), width)
                    else:
                        off = max(0.0, abs(wanted[width] - s * stands(code, joint)) - s * 2.0 ** (1 - joint))
                    loss += 2 ** (width - 2) * off**2
                losses.append(loss)
            code = min(range(2**joint), key=losses.__getitem__)
            chosen = {width: code >> (joint - width) for width in range(2, joint + 1)}
            for width in range(joint + 1, bits + 1):
                code = 2 * code + (wanted[width] >= s * stands(code, width - 1))
                chosen[width] = code
            codes[row, column] = code
            inverse = torch.linalg.inv(hessian[left][:, left])
            here = left.index(column)
            for width, vector in work.items():
                error = (wanted[width] - s * stands(chosen[width], width)) / inverse[here, here]
                vector[left] -= error * inverse[here]
            left.remove(column)
    return codes


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_codes(bits: int) -> None:
    weight, hessian = problem(seed=bits)
    codes, scales = nested_codes(weight, hessian, bits, WIDTH // SIZE, 0.01, "w")

    assert torch.equal(codes.long(), restated(weight, scales.double(), hessian, bits, 0.01))


def test_groups_that_do_not_divide_the_width_are_as_even_as_can_be() -> None:
    weight, hessian = problem(seed=4)
    weight, hessian = weight[:, :41], hessian[:41, :41]
    codes, scales = nested_codes(weight, hessian, 8, 3, 0.01, "w")
    assert scales.shape == (OUT, 3)
    stack = PlaneStack(41, OUT, [StackBlock(block) for block in planes(codes, scales, 8)])
    unit = torch.cat(
        [scales[:, :1].expand(-1, 14), scales[:, 1:2].expand(-1, 14), scales[:, 2:].expand(-1, 13)], 1
    )
    assert torch.allclose(stack.dense(), value(codes, 8) * unit.float(), atol=1e-6)
    assert float((stack.dense() - weight).norm()) < 0.3 * float(weight.norm())


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(seed=0)
    whole = nested_codes(weight, hessian, 4, WIDTH // SIZE, 0.01, "w")
    monkeypatch.setattr("compress.quantization.nested.ELEMENTS", 4 * 3 * WIDTH)
    for one, other in zip(nested_codes(weight, hessian, 4, WIDTH // SIZE, 0.01, "w"), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_have_the_least_error_over_all_widths(bits: int) -> None:
    grouped = problem(seed=3)[0].view(OUT, -1, SIZE)
    importance = torch.rand(WIDTH // SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def loss(group: Tensor, weights: Tensor, scale: float) -> float:
        total = 0.0
        for width in range(2, bits + 1):
            levels = torch.tensor([stands(code, width) * scale for code in range(2**width)])
            off = (group[:, None] - levels).abs().amin(1)
            if width > 4:
                off = (group.abs() - 2 * scale).clamp(min=0)
            total += 2 ** (width - 2) * float((off.square() * weights).sum())
        return total

    found = choose_scales(grouped, importance, bits)
    for row in range(OUT):
        for group in range(WIDTH // SIZE):
            values = grouped[row, group]
            tried = [float(values.abs().max() * fraction / 1.5) for fraction in FRACTIONS]
            best = min(loss(values, importance[group], scale) for scale in tried)
            assert loss(values, importance[group], float(found[row, group])) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_blocks_add_up_to_every_width(bits: int) -> None:
    weight, hessian = problem(seed=1)
    codes, scales = nested_codes(weight, hessian, bits, WIDTH // SIZE, 0.01, "w")
    blocks = [StackBlock(block) for block in planes(codes, scales, bits)]
    assert len(blocks) == bits - 1
    for count in range(1, bits):
        stack = PlaneStack(WIDTH, OUT, blocks[:count])
        expected = value(codes >> (bits - 1 - count), count + 1) * scales.float().repeat_interleave(SIZE, 1)
        assert torch.allclose(stack.dense(), expected, atol=1e-6)


def test_every_width_is_better_than_cutting_a_wide_code_and_narrow_ones_are_near_gptq() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    inputs = (inputs / torch.arange(1, 65).sqrt()) @ mix  # some directions matter more, as in models
    weight, hessian = torch.randn(64, 64, generator=generator), inputs.T @ inputs

    def error(rounded: Tensor) -> float:
        off = (rounded - weight).double()
        return float(((off @ hessian) * off).sum())

    codes, scales = nested_codes(weight, hessian, 8, 2, 0.01, "w")
    unit = scales.float().repeat_interleave(32, 1)
    found = {b: error(value(codes >> (8 - b), b) * unit) for b in range(2, 9)}
    wide = round_by_columns(
        weight, hessian, GPTQ.Options(), CompressedTensorsFormat(8, 32, True), torch.float16, "w"
    )
    step, middle = wide.scales.float().repeat_interleave(32, 1), 128
    for bits in (2, 3, 4):
        dropped = 8 - bits
        kept = (wide.codes.int() >> dropped << dropped).float() + (2**dropped - 1) / 2 - middle
        narrow = round_by_columns(
            weight, hessian, GPTQ.Options(), CompressedTensorsFormat(bits, 32, True), torch.float16, "w"
        )
        nearest = quantize_weight(weight, bits, 32, True, torch.float16)
        assert found[bits] < 0.8 * error(kept * step)
        assert found[bits] < 0.8 * error(nearest.dequantize())
        assert found[bits] < 3 * error(narrow.dequantize())
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_zeros_and_inputs_that_never_come_do_no_harm() -> None:
    weight, hessian = problem(seed=2)
    weight[0], weight[1, :SIZE] = 0, 0
    hessian[:, 5] = hessian[5] = 0
    codes, scales = nested_codes(weight, hessian, 8, WIDTH // SIZE, 0.01, "w")
    stack = PlaneStack(WIDTH, OUT, [StackBlock(block) for block in planes(codes, scales, 8)])
    found = stack.dense()
    assert found.isfinite().all()
    assert not found[0].any()
    assert not found[1, :SIZE].any()
