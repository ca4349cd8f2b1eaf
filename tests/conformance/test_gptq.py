"""GPTQ against optimal brain quantization restated with explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quantization.formats import CompressedTensors
from compress.quantization.gptq import GPTQ, quantize
from compress.quantization.quantizer import quantize_weight

WIDTH, OUT, TOKENS = 160, 12, 400
FORM = CompressedTensors(4, 32, True)


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the X^T X of inputs whose columns hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(OUT, WIDTH, generator=generator), inputs.T @ inputs


def grid(group: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of a group, from `quantize_weight`, which has tests of its own."""
    rounded = quantize_weight(group.float(), bits, -1, symmetric, torch.float32)
    return rounded.scales[:, 0].double(), rounded.zeros[:, 0].double()


def restated(weight: Tensor, hessian: Tensor, options: GPTQ.Options, size: int) -> Tensor:
    """Codes: after each column, the inverse of what is left of H is computed anew."""
    work, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int64)
    hessian = hessian + options.damping * hessian.diagonal().mean() * torch.eye(WIDTH)
    columns = range(WIDTH)
    if options.act_order:
        columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    grids = {
        g: grid(weight[:, g * size : (g + 1) * size], options.bits, options.symmetric)
        for g in range(WIDTH // size)
    }
    left = list(columns)
    for column in columns:
        group = column // size
        if not options.act_order and column % size == 0:
            grids[group] = grid(work[:, column : column + size], options.bits, options.symmetric)
        scale, zero = grids[group]
        code = ((work[:, column] / scale).round() + zero).clamp(0, 2**options.bits - 1)
        codes[:, column] = code.long()
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = left.index(column)
        error = (work[:, column] - scale * (code - zero)) / inverse[here, here]
        work[:, left] -= error[:, None] * inverse[here]
        left.remove(column)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "symmetric", "size"), [(2, False, 32), (3, True, 40), (4, False, 160)])
def test_codes(act_order: bool, bits: int, symmetric: bool, size: int) -> None:
    weight, hessian = problem(seed=bits)
    options = GPTQ.Options(bits=bits, symmetric=symmetric, group_size=size, act_order=act_order)
    form = CompressedTensors(bits, size, symmetric)
    found = quantize(weight, hessian, options, form, torch.float32, "w")

    assert torch.equal(found.codes.long(), restated(weight, hessian, options, size))


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_are_rounded_to_nearest(act_order: bool) -> None:
    weight, _ = problem(seed=0)
    options = GPTQ.Options(group_size=32, act_order=act_order)
    found = quantize(weight, torch.diag(torch.rand(WIDTH).double() + 1), options, FORM, torch.float32, "w")

    assert found.same_as(quantize_weight(weight, 4, 32, True, torch.float32))


def test_inputs_that_never_come_do_no_harm() -> None:
    weight, hessian = problem(seed=1)
    hessian[:, 5] = hessian[5] = 0
    options = GPTQ.Options(group_size=32)
    found = quantize(weight, hessian, options, FORM, torch.float32, "w").dequantize()

    assert found.isfinite().all()
    off = (found - weight).double()
    nearest = (quantize_weight(weight, 4, 32, True, torch.float32).dequantize() - weight).double()
    assert ((off @ hessian) * off).sum() < 0.6 * ((nearest @ hessian) * nearest).sum()
