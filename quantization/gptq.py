"""GPTQ (ICLR 2023): weights are rounded column by column, and the columns to come compensate the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from compress.anatomy import linears_by_input, set_weight, weight
from compress.calibration.statistics.hessian import Hessian, damping_of
from compress.engine.activations import Activations
from compress.engine.inputs import advance_keeping
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.columns import round_by_columns
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.options import DampingOptions, WeightOptions
from compress.quantization.parts.packer import Packer
from compress.storage.formats.base import Format

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import Layer, Stream, StreamedModel
    from compress.method import StepContext


class GPTQ(Method["GPTQ.Options"]):
    """Round weights column by column; later columns compensate the error on calibration data.

    For a linear W [out, in] with inputs X [tokens, in], H = X^T X + damping * mean(diag) I, and U is the
    upper Cholesky factor of H^-1. For every column j in turn: q_j is the nearest code of w_j, and
    W[:, k] -= (w_j - s (q_j - z)) / U[j, j] * U[j, k] for all k > j.

    Every layer is calibrated on the outputs of the layers before it, which are already quantized. A group
    gets its grid when its first column is rounded, from the weights as they are then. With ``act_order``,
    columns with large inputs come first; then groups get their grids from the weights before any change, so
    that groups stay contiguous and every loader can read the result.

    The paper's grids span the extremes of their groups. With ``clip`` a group is cut off at that share of its
    largest magnitude for which the sum of H[j, j] (w_j - s (q_j - z))^2 is least, when w_j are its weights
    and q_j their nearest codes.

    A head that is packed is rounded in the same way, after all layers, also where it is the token embedding.

    With ``asymmetric_calibration`` (GPTAQ, arXiv 2504.02692) outputs are to match those of the dense model,
    in which the linear has other inputs X~: the error is ||X~ W^T - X Ŵ^T||^2. When column q is rounded, the
    columns after it also compensate its share (X~ - X)_q w_q of the difference (see `compensation`). The
    paper takes w_q as it is by then; here it is the weight before any change, for which the compensation is
    exactly least squares at every step. This is a regression with one coefficient per input, so it needs many
    tokens; with few of them the full compensation makes models worse.
    """

    name = "gptq"
    family = "quantization"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"
    )

    class Options(DampingOptions, WeightOptions):
        clip: bool = Field(
            True,
            description="cut groups off where that makes their errors smaller, weighted by the inputs; "
            "otherwise grids span the extremes of their groups, as published",
        )
        act_order: bool = Field(
            True,
            description="round columns with larger inputs first; all groups then get their grids beforehand",
        )
        true_sequential: bool = Field(
            False,
            description="measure the inputs of a layer's linears one after another, each with the linears "
            "before it already quantized; takes about twice the time",
        )
        asymmetric_calibration: float = Field(
            0.0,
            ge=0,
            le=1,
            description="share of the errors of the layers before that is compensated as well (GPTAQ); the "
            "text then also goes through the dense model; 0: none; gptqmodel uses 0.25",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return plan_packed(shape, options)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        stream = model.stream(context.calibration, context.folder / "stream")
        dense = None
        if options.asymmetric_calibration:
            dense = model.stream(context.calibration, context.folder / "dense")
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state)
        streams = [stream] if dense is None else [stream, dense]
        for layer in model.walk(journal, *streams, label=f"GPTQ to {options.bits} bits"):
            groups = linears_by_input(model.anatomy, layer.linears)
            inputs: dict[str, Activations] = {}
            if dense is not None:
                inputs = advance_keeping(
                    dense, layer, [paths[0] for paths in groups], context.folder / "inputs"
                )
            for together in [[paths] for paths in groups] if options.true_sequential else [groups]:
                hessians = [Hessian(inputs.get(paths[0])) for paths in together]
                self._quantize(layer, stream, together, hessians, packer, options)
            stream.advance(layer)
        return packer.finish(model, stream, options)

    @staticmethod
    def _quantize(
        layer: Layer,
        stream: Stream,
        groups: list[list[str]],
        hessians: list[Hessian],
        packer: Packer,
        options: Options,
    ) -> None:
        """Measure the inputs of some linears, then round these in memory and in the draft."""
        stream.look(layer, {paths[0]: hessian.add for paths, hessian in zip(groups, hessians, strict=True)})
        for paths, hessian in zip(groups, hessians, strict=True):
            assert hessian.sum is not None  # it has just seen the text
            stored = packer.wanted(layer, paths)
            # Linears with the same input go through the columns together if they are rounded in the same way.
            alike: dict[tuple[Format, torch.dtype], list[str]] = {}
            for path, name in stored.items():
                alike.setdefault((packer.format_of(name), packer.scale_dtype(name)), []).append(path)
            for (form, scale_dtype), wanted in alike.items():
                dense = [weight(layer.linears[path]) for path in wanted]
                rounded = round_by_columns(
                    torch.cat(dense),
                    hessian.sum,
                    options,
                    form,
                    scale_dtype,
                    stored[wanted[0]],
                    damping=options.damping or damping_of(len(hessian.sum), hessian.tokens),
                    difference=hessian.difference,
                )
                for path, before, part in zip(
                    wanted, dense, rounded.split([len(rows) for rows in dense]), strict=True
                ):
                    packer.write(stored[path], before, part)
                    set_weight(layer.linears[path], part.dequantize())
