"""AWQ (MLSys 2024): input channels that see large activations are scaled up before weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.anatomy import linears_by_input, weight
from compress.calibration.statistics.hessian import Hessian
from compress.engine.stream import Seen
from compress.kernels.codes.integer import (
    CHANNEL,
    QuantizedWeight,
    choose_grid,
    nearest_codes,
    quantize_weight,
)
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.folding import Fold, fold, fold_of, write_changed
from compress.quantization.parts.layout import WeightOptions, plan_packed
from compress.quantization.parts.packer import Packer
from compress.storage.formats.base import Format

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

ALPHAS = torch.linspace(0, 1, 20, dtype=torch.float64).tolist()
"""Section 3.2."""

BLOCK = 256
"""Columns of G in one product; only speed depends on it."""
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""Shares of the largest weight of a group that clipping leaves."""


class AWQ(Method):
    """Scale input channels by the activations they see, round, and clip each group where that errs least.

    For the linears W_i that read the same input x, whose channels have the mean magnitude m_j = mean |x_j|
    over the calibration tokens (padding excepted):

    1. Scales: s_j = m_j^alpha, divided by sqrt(max s * min s). Of 20 alphas in [0, 1] the one whose output
       error is smallest, sum over i of ||(Q(W_i diag(s)) diag(s)^-1 - W_i) x||^2 with Q round-to-nearest
       (equation 4). W_i becomes W_i diag(s); 1/s is folded into what x comes from: the norm before query,
       key and value, or gate and up; the value projection before the attention output; up before down in a
       gated MLP. Where nothing can take it up, that input keeps s = 1, and the report says so.
    2. Clipping: every group of a row gets the grid of its weights cut off at a share of their largest
       magnitude, the one of ten shares from 1 to 0.55 that has the smallest error of the group's own
       contribution to the output.

    Both errors are quadratic forms in G = sum x x^T, taken once: tr(E G E^T), with the diagonal blocks of G
    for step 2. That costs out in^2 operations where going through the tokens costs 2 tokens out in, and
    there are more tokens than inputs wherever calibration is to mean anything.

    Activations are the dense model's, as published. Differences from the published code: the value
    projection is scaled with grouped-query attention, too (the query heads of a group share their scales,
    from their mean m_j); the error of step 1 is that of the linears themselves, not of the attention or MLP
    around them; m_j is taken to be mean(m) / 10^4 at least; query and key are clipped, too; and scales before
    a norm are moved by up to half a step of the dtype its weight is stored in, to be exact there.
    """

    name = "awq"
    family = "quantization"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", "2306.00978"
    )

    Options = WeightOptions

    def plan(self, shape: ModelShape, options: WeightOptions) -> ModelShape:
        return plan_packed(shape, options)

    def apply(self, model: StreamedModel, options: WeightOptions, context: StepContext) -> StepReport:
        stream = model.stream(context.calibration, context.folder / "stream")
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state)
        for layer in model.walk(journal, stream, label=f"AWQ to {options.bits} bits"):
            groups = linears_by_input(model.anatomy, layer.linears)
            inputs = [Inputs() for _ in groups]
            stream.advance(layer, {paths[0]: seen.add for paths, seen in zip(groups, inputs, strict=True)})
            stored = {path: layer.stored(path) for path in layer.linears}
            grids = {
                path: Grid(packer.format_of(name), packer.scale_dtype(name), name)
                for path, name in stored.items()
                if packer.wants(name)
            }
            changed: set[str] = set()
            for paths, seen in zip(groups, inputs, strict=True):
                where = fold_of(model, layer.index, paths)
                dense = {path: weight(layer.linears[path]) for path in paths if path in grids}
                if where is not None and dense:
                    scales = choose_scales(dense, grids, seen, where)
                    seen.divide(fold(model, layer, where, paths, scales))
                    changed |= {where.producer, *paths}
            for paths, seen in zip(groups, inputs, strict=True):
                for path in (path for path in paths if path in grids):
                    dense = weight(layer.linears[path])
                    packer.write(stored[path], dense, clipped(dense, seen.gram, grids[path]))
            write_changed(context.draft, model, layer, changed)
        return self._report(model, packer)

    @staticmethod
    def _report(model: StreamedModel, packer: Packer) -> StepReport:
        report, anatomy = packer.finish(), model.anatomy
        first = (anatomy.query, anatomy.attention_output, anatomy.up, anatomy.down)
        unscaled = [path for path in first if fold_of(model, 0, [path]) is None]
        report.details["unscaled"] = unscaled
        if unscaled:
            report.summary += f"; nothing takes up scales before {', '.join(unscaled)}"
        return report


@dataclass(frozen=True)
class Grid:
    """What the codes of one linear may be."""

    form: Format
    scale_dtype: torch.dtype
    name: str


class Inputs:
    """The inputs of some linears without padding, summed up in float64.

    Attributes:
        gram: sum of x x^T [in, in].
        magnitude: sum of |x| [in].
    """

    def __init__(self) -> None:
        self._hessian = Hessian()
        self.magnitude: torch.Tensor | None = None

    @property
    def gram(self) -> torch.Tensor:
        return self._hessian.sum

    def add(self, seen: Seen) -> None:
        self._hessian.add(seen)
        magnitude = seen.inputs[seen.mask].abs().sum(0, dtype=torch.float64)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude

    def divide(self, scales: torch.Tensor) -> None:
        """What the sums are when the inputs have been divided by ``scales`` [in]."""
        scales = scales.double()
        self._hessian.sum.div_(scales).div_(scales[:, None])
        self.magnitude = self.magnitude / scales


def choose_scales(
    dense: dict[str, torch.Tensor], grids: dict[str, Grid], seen: Inputs, where: Fold
) -> torch.Tensor:
    """Step 1 for weights [out, in] by path: the scales of the units, float64 [units]."""
    magnitude = torch.zeros(len(where.rows), dtype=torch.float64, device=seen.magnitude.device)
    # Sums stand for means here: all units have equally many channels, and all channels equally many tokens.
    magnitude.index_add_(0, where.units.to(magnitude.device), seen.magnitude)
    magnitude = (magnitude / magnitude.mean().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=1e-4)
    # G is symmetric: with L below its diagonal and half of that, tr(E G E^T) = 2 tr(E L E^T).
    lower = seen.gram.float().tril_()
    lower.diagonal().div_(2)
    best, lowest = torch.ones_like(magnitude), float("inf")
    for alpha in ALPHAS:
        scales = magnitude**alpha
        scales /= (scales.max() * scales.min()).sqrt()
        channels = scales[where.units].float()
        error = 0.0
        for path, matrix in dense.items():
            off = rounded(matrix * channels, grids[path]).dequantize().div_(channels).sub_(matrix)
            error += half_form(off, lower)
        if error < lowest:
            best, lowest = scales, error
    return best


def half_form(off: torch.Tensor, lower: torch.Tensor) -> float:
    """tr(E L E^T) of E [out, in] and a lower triangular L [in, in]: half as much work as for all of L."""
    starts = range(0, off.shape[1], BLOCK)
    parts = zip(off.split(BLOCK, 1), lower.split(BLOCK, 1), starts, strict=True)
    return sum(float((off[:, at:] @ columns[at:]).mul_(part).sum()) for part, columns, at in parts)


def rounded(matrix: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """Q(matrix): round to nearest."""
    return quantize_weight(
        matrix, grid.form.bits, grid.form.group_size, grid.form.symmetric, grid.scale_dtype, grid.name
    )


def clipped(dense: torch.Tensor, gram: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """Step 2 for a weight [out, in]."""
    out, width = dense.shape
    size = width if grid.form.group_size == CHANNEL else grid.form.group_size
    grouped = dense.float().reshape(out, -1, size).transpose(0, 1)  # [groups, out, size]
    starts = range(0, width, size)
    blocks = torch.stack([gram[at : at + size, at : at + size] for at in starts]).float()
    largest = grouped.abs().amax(-1, keepdim=True)
    lowest = torch.full(grouped.shape[:2], float("inf"), device=dense.device)
    best = rounded(dense, grid)
    for share in SHARES:
        # The symmetric grid has a side with one level more, which cutting could turn round.
        cut = grouped * share if grid.form.symmetric else grouped.clamp(-share * largest, share * largest)
        scales, zeros = choose_grid(cut, grid.form.bits, grid.form.symmetric, grid.scale_dtype, grid.name)
        codes = nearest_codes(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), grid.form.bits)
        off = (codes - zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).sub_(grouped)
        error = (torch.bmm(off, blocks) * off).sum(-1)
        better = (error < lowest).T
        lowest = torch.where(better.T, error, lowest)
        best.codes.view(out, -1, size)[better] = codes.to(torch.uint8).transpose(0, 1)[better]
        best.scales[better] = scales.T[better]
        best.zeros[better] = zeros.T[better].to(torch.uint8)
    return best
