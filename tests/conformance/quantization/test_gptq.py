"""GPTQ against optimal brain quantization restated with explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.calibration.statistics.hessian import DAMPING
from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.quantization.gptq import GPTQ
from compress.quantization.parts.columns import compensation, round_by_columns
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat

WIDTH, OUT, TOKENS = 160, 12, 400
FORM = CompressedTensorsFormat(4, 32, True)


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


def clipped(group: Tensor, bits: int, symmetric: bool, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of each row cut off at the best of ten shares of its largest magnitude."""
    rows = []
    for row in group.double():
        tried = []
        for share in range(20, 10, -1):
            most = share / 20 * row.abs().max()
            cut = row * share / 20 if symmetric else row.clamp(-most, most)
            scale, zero = (value[0] for value in grid(cut[None], bits, symmetric))
            off = row - scale * (((row / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
            tried.append((float((importance * off**2).sum()), scale, zero))
        rows.append(min(tried, key=lambda entry: entry[0])[1:])
    scales, zeros = zip(*rows, strict=True)
    return torch.stack(scales), torch.stack(zeros)


def restated(weight: Tensor, hessian: Tensor, options: GPTQ.Options, size: int) -> Tensor:
    """Codes: after each column, the inverse of what is left of H is computed anew."""
    work, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int64)
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH)
    columns = range(WIDTH)
    if options.act_order:
        columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()

    def chosen(at: int, values: Tensor) -> tuple[Tensor, Tensor]:
        group = values[:, at : at + size], options.bits, options.symmetric
        return clipped(*group, hessian.diagonal()[at : at + size]) if options.clip else grid(*group)

    grids = {at // size: chosen(at, weight) for at in range(0, WIDTH, size)}
    left = list(columns)
    for column in columns:
        group = column // size
        if not options.act_order and column % size == 0:
            grids[group] = chosen(column, work)
        scale, zero = grids[group]
        code = ((work[:, column] / scale).round() + zero).clamp(0, 2**options.bits - 1)
        codes[:, column] = code.long()
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = left.index(column)
        error = (work[:, column] - scale * (code - zero)) / inverse[here, here]
        work[:, left] -= error[:, None] * inverse[here]
        left.remove(column)
    return codes


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "symmetric", "size"), [(2, False, 32), (3, True, 40), (4, False, 160)])
def test_codes(clip: bool, act_order: bool, bits: int, symmetric: bool, size: int) -> None:
    weight, hessian = problem(seed=bits)
    how = {"clip": clip, "act_order": act_order}
    options = GPTQ.Options(bits=bits, symmetric=symmetric, group_size=size, **how)
    form = CompressedTensorsFormat(bits, size, symmetric)
    found = round_by_columns(weight, hessian, options, form, torch.float32, "w")

    assert torch.equal(found.codes.long(), restated(weight, hessian, options, size))


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_are_rounded_to_nearest(act_order: bool) -> None:
    weight, _ = problem(seed=0)
    options = GPTQ.Options(group_size=32, act_order=act_order, clip=False)
    found = round_by_columns(
        weight, torch.diag(torch.rand(WIDTH).double() + 1), options, FORM, torch.float32, "w"
    )

    assert found.same_as(quantize_weight(weight, 4, 32, True, torch.float32))


def test_inputs_that_never_come_do_no_harm() -> None:
    weight, hessian = problem(seed=1)
    hessian[:, 5] = hessian[5] = 0
    options = GPTQ.Options(group_size=32)
    found = round_by_columns(weight, hessian, options, FORM, torch.float32, "w").dequantize()

    assert found.isfinite().all()
    off = (found - weight).double()
    nearest = (quantize_weight(weight, 4, 32, True, torch.float32).dequantize() - weight).double()
    assert ((off @ hessian) * off).sum() < 0.6 * ((nearest @ hessian) * nearest).sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_never_come_do_not_dampen_the_others(act_order: bool) -> None:
    """Damping is a share of what is there, however small that is."""
    weight, hessian = problem(seed=2)
    hessian *= 1e-9
    hessian[:, 5] = hessian[5] = 0
    options = GPTQ.Options(group_size=32, act_order=act_order, symmetric=True)
    found = round_by_columns(weight, hessian, options, FORM, torch.float32, "w")
    assert torch.equal(found.codes.long(), restated(weight, hessian, options, 32))


def two_streams(seed: int, width: int = 24, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its inputs X, and those of the dense model X~, whose columns hang together in another way."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    other = 0.3 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(OUT, width, generator=generator), inputs, inputs + inputs.abs() @ other


def solved_step_by_step(weight: Tensor, inputs: Tensor, dense: Tensor, options: GPTQ.Options) -> Tensor:
    """Codes: after each column the others are solved for anew, by least squares on the tokens themselves.

    What the first q columns owe is their share of X~ W^T less what they give, X_q w^_q. What the columns
    behind give is to be X w^T plus that, where damping is a row for each column that holds it to w.
    """
    weight, width = weight.double(), inputs.shape[1]
    size = options.group_size
    damping = DAMPING * inputs.square().sum(0).mean()
    held = torch.cat((inputs, damping.sqrt() * torch.eye(width, dtype=torch.float64)))
    owed = torch.cat((dense - inputs, torch.zeros(width, width, dtype=torch.float64)))
    order = list(range(width))
    if options.act_order:
        order = inputs.square().sum(0).argsort(descending=True, stable=True).tolist()
    grids = {at // size: grid(weight[:, at : at + size], options.bits, False) for at in range(0, width, size)}
    now, rounded = weight.clone(), torch.zeros_like(weight)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for position, column in enumerate(order):
        if not options.act_order and column % size == 0:
            # The grid of a group counts in what its columns will be moved by.
            whole = now.clone()
            for early in range(column, column + size):
                behind = list(range(early + 1, width))
                if behind:
                    part = torch.linalg.lstsq(held[:, behind], owed[:, early : early + 1]).solution
                    whole[:, behind] += weight[:, early : early + 1] @ part.T
            grids[column // size] = grid(whole[:, column : column + size], options.bits, False)
        scale, zero = grids[column // size]
        code = ((now[:, column] / scale).round() + zero).clamp(0, 2**options.bits - 1)
        codes[:, column], rounded[:, column] = code.long(), scale * (code - zero)
        done, left = order[: position + 1], order[position + 1 :]
        if left:
            wanted = owed[:, done] @ weight[:, done].T - held[:, done] @ (rounded - weight)[:, done].T
            now[:, left] = weight[:, left] + torch.linalg.lstsq(held[:, left], wanted).solution.T
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 8), (3, 24), (4, 12)])
def test_asymmetric_calibration_is_least_squares_at_every_step(act_order, bits, size) -> None:
    weight, inputs, dense = two_streams(seed=bits)
    options = GPTQ.Options(
        bits=bits,
        symmetric=False,
        group_size=size,
        act_order=act_order,
        asymmetric_calibration=1,
        clip=False,
    )
    form = CompressedTensorsFormat(bits, size, False)
    gram, difference = inputs.T @ inputs, (dense - inputs).T @ inputs
    found = round_by_columns(weight, gram, options, form, torch.float32, "w", difference=difference)

    assert torch.equal(found.codes.long(), solved_step_by_step(weight, inputs, dense, options))
    plain = round_by_columns(weight, gram, options, form, torch.float32, "w")
    errors = [
        float((dense @ weight.double().T - inputs @ each.dequantize().double().T).square().sum())
        for each in (found, plain)
    ]
    assert errors[0] < errors[1]


def test_without_a_difference_nothing_is_made_up_for() -> None:
    weight, inputs, _ = two_streams(seed=0)
    gram, form = inputs.T @ inputs, CompressedTensorsFormat(4, 12, True)

    def rounded(share: float, difference: torch.Tensor | None) -> QuantizedWeight:
        options = GPTQ.Options(group_size=12, asymmetric_calibration=share)
        return round_by_columns(weight, gram, options, form, torch.float32, "w", difference=difference)

    plain = rounded(0, None)
    assert rounded(1, 0 * gram).same_as(plain)
    assert rounded(0.5, gram).same_as(rounded(0.25, 2 * gram))
    assert not rounded(0.5, gram).same_as(plain)


@given(seed=st.integers(0, 1000), width=st.integers(1, 12), unused=st.booleans())
@settings(max_examples=25)
def test_a_row_of_p_is_a_regression_on_the_columns_behind(seed: int, width: int, unused: bool) -> None:
    _, inputs, dense = two_streams(seed, width, tokens=40)
    if unused:  # behind the quantized layers, but not in the dense model
        inputs[:, seed % width] = 0
    hessian = inputs.T @ inputs
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found = compensation((dense - inputs).T @ inputs, upper)
    for column in range(width):
        behind = inputs[:, column + 1 :]
        wanted = torch.linalg.pinv(behind) @ (dense - inputs)[:, column]
        assert torch.allclose(found[column, column + 1 :], wanted, rtol=1e-5, atol=1e-7)
        assert not found[column, : column + 1].any()
