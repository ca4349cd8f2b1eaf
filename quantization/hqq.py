"""HQQ (2023): grids chosen without data, by a norm that forgives outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.kernels.codes.integer import (
    QuantizedWeight,
    choose_grid,
    nearest_codes,
    number_of_groups,
    storable,
)
from compress.kernels.reference.ops import row_slices
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.options import WeightOptions
from compress.quantization.parts.packer import Packer

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

P = 0.7
"""The exponent of the norm: sum |e|^P."""

BETA, KAPPA, ITERATIONS = 5.0, 1.01, 20
"""The first beta, its growth in every iteration, and the number of iterations."""


class HQQ(Method[WeightOptions]):
    """Choose the grid of every group by the p-norm of its rounding error, with p < 1; no calibration.

    For a group w with codes q, scale s and zero point z, minimise ||w - s (q - z)||_p^p, p = 0.7, by
    half-quadratic splitting: with x = (w - s (q - z)) / s and an auxiliary error e, minimise ||e||_p^p +
    beta/2 ||e - x||^2 in turn over

    1. q, the nearest codes;
    2. e = sign(x) max(|x| - |x|^(p-1) / beta, 0), the generalised soft threshold, which leaves large errors
       out of the fit;
    3. s, by least squares of w - s e on q - z;

    while beta grows by kappa. Of all iterates, including the grid of min-max, the one with the smallest
    p-norm is kept. Each is evaluated with s rounded as scales are stored.

    The published method differs: it keeps s and moves a real z to the mean of q - w / s + e. The formats
    here, which other programs read, have whole zero points. From a whole z that step never gets away, since
    rounding errors are at most half a step. So z stays that of min-max, and s, which is real, is moved in its
    place. Errors are measured in steps, so that beta means the same for small and for large weights: with the
    published beta of 10, |x|^(p-1) / beta would be above |x| for all errors below 0.17.

    A smaller p-norm does not always make a better model: it cuts large weights, which small models cannot
    spare. At 3 bits such a model can come out worse than from plain rounding to nearest.
    """

    name = "hqq"
    family = "quantization"
    paper = Paper(
        "Half-Quadratic Quantization of Large Machine Learning Models",
        url="https://mobiusml.github.io/hqq_blog/",
    )
    needs_calibration = False

    Options = WeightOptions

    def plan(self, shape: ModelShape, options: WeightOptions) -> ModelShape:
        return plan_packed(shape, options)

    def apply(self, model: StreamedModel, options: WeightOptions, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state)
        for layer in model.walk(journal, label=f"HQQ to {options.bits} bits"):
            for stored, dense in packer.linears(layer):
                form = packer.format_of(stored)
                grid = (form.bits, form.group_size, form.symmetric, packer.scale_dtype(stored))
                packer.write(stored, dense, half_quadratic(dense, *grid, stored))
        return packer.finish()


def half_quadratic(
    dense: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, name: str
) -> QuantizedWeight:
    """The algorithm for one weight [out, in], in float32.

    Raises:
        BadInput: as in `quantize_weight`.
    """
    out, width = dense.shape
    grouped = dense.float().reshape(out, number_of_groups(width, group_size, name), -1)
    parts = (grouped[rows] for rows in row_slices(out, width, dense.device))
    grids = [fitted_grid(part, bits, symmetric, scale_dtype, name) for part in parts]
    scales, zeros = map(torch.cat, zip(*grids, strict=True))
    codes = nearest_codes(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), bits)
    return QuantizedWeight(
        codes.view(out, width).to(torch.uint8), scales, zeros.to(torch.uint8), bits, group_size, symmetric
    )


def fitted_grid(
    grouped: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of groups [out, groups, group_size], as `choose_grid` returns them."""
    scale, zeros = choose_grid(grouped, bits, symmetric, scale_dtype, name)
    best, lowest, beta = scale, torch.full_like(zeros, float("inf")), BETA
    for _ in range(ITERATIONS + 1):
        step = scale.float()
        levels = nearest_codes(grouped, step.unsqueeze(-1), zeros.unsqueeze(-1), bits)
        levels.sub_(zeros.unsqueeze(-1))
        steps = grouped / step.unsqueeze(-1)
        x = steps - levels
        size = x.abs()
        power = size.log().mul_(P).exp_()  # |x|^p; much faster than pow
        norm = power.sum(-1) * step.abs() ** P
        better = norm < lowest
        lowest, best = torch.where(better, norm, lowest), torch.where(better, scale, best)
        threshold = power.div_(size.clamp(min=torch.finfo(torch.float32).tiny)).div_(beta)
        error = (size - threshold).clamp_(min=0).mul_(x.sign_())
        share = (steps.sub_(error) * levels).sum(-1) / levels.square().sum(-1)
        # A group whose codes all equal the zero point has nothing to fit; its share is NaN.
        # A scale that cannot be stored is infinite. The norm of its errors is NaN, so it is not kept.
        scale = storable(step * torch.where(share > 0, share, 1), scale_dtype, None)
        beta *= KAPPA
    return best, zeros
