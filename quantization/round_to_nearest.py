"""Round-to-nearest: the baseline that every other method is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.kernels.codes.integer import quantize_weight
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.options import WeightOptions
from compress.quantization.parts.packer import Packer

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class RoundToNearest(Method[WeightOptions]):
    """Round every weight of the layers to the nearest point of a low-bit grid; no calibration.

    For each group of consecutive inputs of an output row, s and z follow from the smallest and the largest
    weight, and q = clamp(round(w / s) + z, 0, 2^b - 1) (see `quantize_weight`). Norms and biases are kept;
    the embedding and the head are kept unless an option asks for them. The packed codes are written in a
    format that other programs load, and are read back and compared at once.
    """

    name = "rtn"
    family = "quantization"
    paper = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        "1712.05877",
    )
    needs_calibration = False

    Options = WeightOptions

    def plan(self, shape: ModelShape, options: WeightOptions) -> ModelShape:
        return plan_packed(shape, options)

    def apply(self, model: StreamedModel, options: WeightOptions, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state)
        for layer in model.walk(journal, label=f"rounding to {options.bits} bits"):
            for stored, dense in packer.linears(layer):
                form = packer.format_of(stored)
                grid = (form.bits, form.group_size, form.symmetric, packer.scale_dtype(stored))
                name = stored.removesuffix(".weight")
                packer.write(stored, dense, quantize_weight(dense, *grid, name))
        return packer.finish()
