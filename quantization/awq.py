"""AWQ (MLSys 2024): input channels with large activations are scaled up before weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.anatomy import linears_by_input, weight
from compress.calibration.statistics.hessian import Hessian
from compress.calibration.text.settings import TextSize
from compress.engine.stream import Seen
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, quantize_weight
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.clipping import clip
from compress.quantization.parts.folding import Fold, fold, fold_of, write_changed
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.options import WeightOptions
from compress.quantization.parts.packer import Packer
from compress.storage.formats.base import Format

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import Stream, StreamedModel
    from compress.method import StepContext

ALPHAS = torch.linspace(0, 1, 20, dtype=torch.float64).tolist()
"""Powers of the mean magnitudes that are tried as scales (section 3.2 of the paper)."""

GRAM_COLUMNS = 256
"""Columns of G in one product. Only speed depends on it."""


class AWQ(Method[WeightOptions]):
    """Scale input channels by their activations, round, and clip each group where the error is least.

    For the linears W_i that read the same input x, whose channels have the mean magnitude m_j = mean |x_j|
    over the calibration tokens (without padding):

    1. Scales: s_j = m_j^alpha, divided by sqrt(max s * min s). Of 20 alphas in [0, 1] the one with the
       smallest output error is taken: sum over i of ||(Q(W_i diag(s)) diag(s)^-1 - W_i) x||^2 with Q
       round-to-nearest (equation 4). W_i becomes W_i diag(s). 1/s is folded into the module that x comes
       from: the norm before query, key and value, or before gate and up; the value projection before the
       attention output; up before down in a gated MLP. An input that comes from no such module keeps s = 1,
       and the report says so.
    2. Clipping: every group of a row gets the grid of its weights cut off at a share of their largest
       magnitude. Of ten shares from 1 to 0.55 the one with the smallest error of the group's own contribution
       to the output is taken.

    Both errors are quadratic forms in G = sum x x^T, which is measured once: tr(E G E^T), with the diagonal
    blocks of G for step 2. That costs out in^2 operations, and going through the tokens would cost 2 tokens
    out in; there are more tokens than inputs wherever calibration is to mean anything.

    Activations are the dense model's, as published. Differences from the published code: the value projection
    is also scaled with grouped-query attention (the query heads of a group share their scales, from their
    mean m_j); the error of step 1 is that of the linears themselves, not of the attention or MLP around them;
    m_j is at least mean(m) / 10^4; query and key are clipped as well; and scales before a norm are moved by
    up to half a step of the dtype that the norm's weight is stored in, so that it is exact. A head that is
    packed is not scaled, but rounded with the error feedback of GPTQ.
    """

    name = "awq"
    family = "quantization"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", "2306.00978"
    )
    text_size = TextSize(32, 512)

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
            stored = packer.wanted(layer)
            grids = {
                path: Grid(packer.format_of(name), packer.scale_dtype(name), name)
                for path, name in stored.items()
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
                    scaled = weight(layer.linears[path])
                    packer.write(stored[path], scaled, clipped(scaled, seen.gram, grids[path]))
            write_changed(context.draft, model, layer, changed)
        return self._report(model, packer, stream)

    @staticmethod
    def _report(model: StreamedModel, packer: Packer, stream: Stream) -> StepReport:
        report, anatomy = packer.finish(model, stream), model.anatomy
        first = (anatomy.query, anatomy.attention_output, anatomy.up, anatomy.down)
        linears = packer.before.linears()  # layers that were pruned may lack some
        unscaled = [
            path
            for path in first
            if any(
                f"{anatomy.layer_name(index)}.{path}" in linears and fold_of(model, index, [path]) is None
                for index in range(model.num_layers)
            )
        ]
        report.details["unscaled"] = unscaled
        if unscaled:
            report.summary += f"; no module can take up scales before {', '.join(unscaled)}"
        return report


@dataclass(frozen=True)
class Grid:
    """How one linear is rounded: its format, the dtype of its scales, and its name for error messages."""

    form: Format
    scale_dtype: torch.dtype
    name: str


class Inputs:
    """Sums in float64 over the inputs x of some linears, without padding."""

    def __init__(self) -> None:
        self._hessian = Hessian()
        self._magnitude: torch.Tensor | None = None

    @property
    def gram(self) -> torch.Tensor:
        """Sum of x x^T [in, in]."""
        assert self._hessian.sum is not None  # inputs have been added
        return self._hessian.sum

    @property
    def tokens(self) -> int:
        return self._hessian.tokens

    @property
    def magnitude(self) -> torch.Tensor:
        """Sum of |x| [in]."""
        assert self._magnitude is not None  # inputs have been added
        return self._magnitude

    def add(self, seen: Seen) -> None:
        """Add the inputs of a batch."""
        self._hessian.add(seen)
        magnitude = seen.real(seen.inputs).abs().sum(0, dtype=torch.float64)
        self._magnitude = magnitude if self._magnitude is None else self._magnitude + magnitude

    def divide(self, scales: torch.Tensor) -> None:
        """Turn the sums into those of the inputs divided by ``scales`` [in]."""
        scales = scales.double()
        self.gram.div_(scales).div_(scales[:, None])
        self._magnitude = self.magnitude / scales


def choose_scales(
    dense: dict[str, torch.Tensor], grids: dict[str, Grid], seen: Inputs, where: Fold
) -> torch.Tensor:
    """Step 1: the scales of the units of a fold, float64 [units].

    Args:
        dense: path of a linear -> weight [out, in].
        grids: path of a linear -> how it is rounded.
        seen: the inputs of these linears.
        where: the module that takes up the scales.
    """
    magnitude = torch.zeros(len(where.rows), dtype=torch.float64, device=seen.magnitude.device)
    # Sums do for means: all units have equally many channels, and all channels equally many tokens.
    units = where.units.to(magnitude.device)
    magnitude.index_add_(0, units, seen.magnitude)
    magnitude = (magnitude / magnitude.mean().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=1e-4)
    # G is symmetric: with L below its diagonal and half of that, tr(E G E^T) = 2 tr(E L E^T).
    lower = seen.gram.float().tril_()
    lower.diagonal().div_(2)
    best, lowest = torch.ones_like(magnitude), magnitude.new_full((), torch.inf)
    for alpha in ALPHAS:
        scales = magnitude**alpha
        scales /= (scales.max() * scales.min()).sqrt()
        channels = scales[units].float()
        error = torch.zeros_like(lowest)
        for path, matrix in dense.items():
            off = rounded(matrix * channels, grids[path]).dequantize()
            error += half_form(off.div_(channels).sub_(matrix), lower)
        better = error < lowest  # compared where it is, so that no alpha waits for the device
        best, lowest = torch.where(better, scales, best), torch.where(better, error, lowest)
    return best


def half_form(off: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """tr(E L E^T) in float64, of E [out, in] and a lower triangular L [in, in]: half the work of a full L."""
    starts = range(0, off.shape[1], GRAM_COLUMNS)
    parts = zip(off.split(GRAM_COLUMNS, 1), lower.split(GRAM_COLUMNS, 1), starts, strict=True)
    total = off.new_zeros((), dtype=torch.float64)
    for part, columns, at in parts:
        total += (off[:, at:] @ columns[at:]).mul_(part).sum()
    return total


def rounded(matrix: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """Q(matrix): a weight [out, in] rounded to the nearest codes; it is checked when it is `clipped`."""
    form, name = grid.form, grid.name
    return quantize_weight(
        matrix, form.bits, form.group_size, form.symmetric, grid.scale_dtype, name, check=False
    )


def clipped(dense: torch.Tensor, gram: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """Step 2: a weight [out, in], rounded with clipped groups. ``gram`` is G of its inputs."""
    form, (out, width) = grid.form, dense.shape
    size = width if form.group_size == CHANNEL else form.group_size
    grouped = dense.float().reshape(out, -1, size).transpose(0, 1)  # [groups, out, size]
    starts = range(0, width, size)
    blocks = torch.stack([gram[at : at + size, at : at + size] for at in starts]).float()
    codes, scales, zeros = clip(
        grouped, form, grid.scale_dtype, grid.name, lambda off: (torch.bmm(off, blocks) * off).sum(-1)
    )
    return QuantizedWeight(
        codes.transpose(0, 1).reshape(out, width),
        scales.T.contiguous(),
        zeros.T.to(torch.uint8).contiguous(),
        form.bits,
        form.group_size,
        form.symmetric,
    )
