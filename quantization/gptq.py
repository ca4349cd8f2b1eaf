"""GPTQ (ICLR 2023): weights are rounded one column after another, and those to come make up for the error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from compress.anatomy import Anatomy, set_weight, weight
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.quantization.formats import Format
from compress.quantization.quantizer import CHANNEL, QuantizedWeight, choose_grid, nearest_codes
from compress.quantization.weights import Packing, WeightOptions, plan_packed

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.run import Run
    from compress.stream import Layer, Stream, StreamedModel

BLOCK = 128
"""Columns between two updates of all columns behind them; only the speed depends on it."""


class GPTQ(Method):
    """Round weights column by column; the columns not yet rounded make up for the error on calibration data.

    For a linear W [out, in] with inputs X [tokens, in], H = X^T X + damping * mean(diag) I, and U the upper
    Cholesky factor of H^-1. For every column j in turn: q_j is the nearest code of w_j, and
    W[:, k] -= (w_j - s (q_j - z)) / U[j, j] * U[j, k] for all k > j.

    Every layer is calibrated on the outputs of the layers before it, quantized already. Groups get their grid
    when their first column comes up, from the weights as they are then; with ``act_order``, which takes
    columns with large inputs first, from the weights before any change, so that groups stay contiguous and
    every loader reads the result.
    """

    name = "gptq"
    family = "quantization"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"
    )

    class Options(WeightOptions):
        act_order: bool = Field(True, description="columns with larger inputs first, with static groups")
        damping: float = Field(
            0.01, gt=0, le=1, description="share of the mean of H's diagonal that is added to it"
        )
        true_sequential: bool = Field(
            False,
            description="measure the inputs of a layer's linears one after another, each behind quantized "
            "ones; takes about twice the time",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return plan_packed(shape, options)

    def apply(self, model: StreamedModel, options: Options, run: Run) -> StepReport:
        stream = model.stream(run.calibration, run.folder / "stream")
        journal = run.journal("rounding")
        packing = Packing(run.draft, options, journal.state)
        for layer in model.walk(journal, stream, label=f"GPTQ to {options.bits} bits"):
            groups = linears_by_input(model.anatomy, layer)
            if options.true_sequential:
                for paths in groups:
                    self._quantize(model, layer, stream, [paths], packing, options)
            else:
                self._quantize(model, layer, stream, groups, packing, options)
            stream.advance(layer)
        return packing.finish()

    @staticmethod
    def _quantize(
        model: StreamedModel,
        layer: Layer,
        stream: Stream,
        groups: list[list[str]],
        packing: Packing,
        options: Options,
    ) -> None:
        """Measure the inputs of some linears, then round them in memory and into the draft."""
        hessians = [Hessian() for _ in groups]
        stream.look(layer, {paths[0]: hessian.add for paths, hessian in zip(groups, hessians, strict=True)})
        for paths, hessian in zip(groups, hessians, strict=True):
            stored = {path: model.weights.find(f"{layer.name}.{path}.weight") for path in paths}
            # Linears with the same input go through the columns together, if they are rounded alike.
            alike: dict[Any, list[str]] = {}
            for path, name in stored.items():
                if packing.wants(name):
                    alike.setdefault((packing.format_of(name), packing.scale_dtype(name)), []).append(path)
            for (form, scale_dtype), wanted in alike.items():
                dense = [weight(layer.linears[path]) for path in wanted]
                rounded = quantize(
                    torch.cat(dense), hessian.sum, options, form, scale_dtype, stored[wanted[0]]
                )
                for path, before, part in zip(
                    wanted, dense, rounded.split([len(rows) for rows in dense]), strict=True
                ):
                    packing.write(stored[path], before, part)
                    set_weight(layer.linears[path], part.dequantize())


class Hessian:
    """X^T X of a linear's inputs without padding: float64 [in, in]."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, _: torch.Tensor, mask: torch.Tensor, __: int) -> None:
        """Products in float32, summed up in float64."""
        rows = inputs[mask].float()
        product = (rows.T @ rows).double()
        self.sum = product if self.sum is None else self.sum + product


def linears_by_input(anatomy: Anatomy, layer: Layer) -> list[list[str]]:
    """The linears of a layer in the order of the data flow, those with the same input together."""
    roles = (("query", "key", "value"), ("attention_output",), ("gate", "up"), ("down",))
    groups = (dict.fromkeys(getattr(anatomy, role) for role in same) for same in roles)
    found = [[path for path in paths if path in layer.linears] for paths in groups]
    return [paths for paths in found if paths]


def quantize(
    dense: torch.Tensor,
    hessian: torch.Tensor,
    options: GPTQ.Options,
    form: Format,
    scale_dtype: torch.dtype,
    name: str,
    grid: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> QuantizedWeight:
    """The algorithm for one weight [out, in] and its H (float64 [in, in], without damping).

    ``grid`` gives scales and zero points of all groups, [out, groups] each, which otherwise are chosen.

    Raises:
        BadInput: NaN or infinite weights, or H is not positive even with damping.
    """
    out, width = dense.shape
    size = width if form.group_size == CHANNEL else form.group_size
    weights, hessian = dense.double().clone(), hessian.clone()
    diagonal = hessian.diagonal()
    unused = diagonal == 0  # no input ever: nothing to make up for, and nothing changes if they are rounded
    diagonal[unused] = 1
    order = torch.arange(width)
    kind = (form.bits, form.symmetric, scale_dtype, name)
    scales, zeros = grid or choose_grid(dense.float().view(out, -1, size), *kind)
    if options.act_order:
        order = diagonal.argsort(descending=True, stable=True)
    weights, hessian = weights[:, order], hessian[order][:, order]
    hessian.diagonal().add_(options.damping * diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise BadInput(
            f"The inputs of '{name}' are too alike for GPTQ; use more calibration text or damping."
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)

    codes = torch.empty(out, width, dtype=torch.uint8)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = torch.zeros(out, stop - start, dtype=torch.float64)
        for column in range(start, stop):
            group = int(order[column]) // size
            if grid is None and not options.act_order and column % size == 0:
                # All columns of the group with what they make up for so far, those behind this block, too.
                behind = weights[:, column : column + size].clone()
                if column + size > stop:
                    done = column - start
                    behind[:, stop - column :] -= errors[:, :done] @ upper[start:column, stop : column + size]
                scale, zero = choose_grid(behind.float().unsqueeze(1), *kind)
                scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
            scale, zero = scales[:, group].double(), zeros[:, group].double()
            code = nearest_codes(weights[:, column], scale, zero, form.bits)
            codes[:, order[column]] = code.to(torch.uint8)
            error = (weights[:, column] - (code - zero) * scale) / upper[column, column]
            weights[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        weights[:, stop:] -= errors @ upper[start:stop, stop:]
    return QuantizedWeight(codes, scales, zeros.to(torch.uint8), form.bits, form.group_size, form.symmetric)
