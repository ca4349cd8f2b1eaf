"""Rounding to FP8, MXFP4 and NVFP4, which hardware multiplies; no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compress.anatomy import linears_by_input, weight
from compress.errors import BadInput
from compress.kernels.codes.floating import FloatType, ScaleRounding, quantize_float
from compress.kernels.codes.integer import CHANNEL
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.layout import Layout, layout_of_one, packed_shape, stored_weights
from compress.quantization.parts.options import IgnoreOptions
from compress.quantization.parts.packer import Packer
from compress.storage.formats.floating import FloatFormat

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class RoundToFloat(Method["RoundToFloat.Options"]):
    """Round every weight of the layers to the nearest low-bit floating-point number; no calibration.

    See `quantize_float` for the scales. Linears that runtimes fuse (query, key and value; gate and up) share
    the global scale of NVFP4. The files are the same as those of llm-compressor's schemes FP8_DYNAMIC,
    MXFP4A16 and NVFP4A16; they are read back and compared at once.
    """

    name = "float"
    family = "quantization"
    paper = Paper("Microscaling Data Formats for Deep Learning", "2310.10537")
    needs_calibration = False

    class Options(IgnoreOptions):
        type: FloatType = Field(
            "fp8",
            description="fp8: E4M3 with one scale per row, and activations in FP8 with one scale per token; "
            "mxfp4: E2M1 in groups of 32 with power-of-two scales; nvfp4: E2M1 in groups of 16 with E4M3 "
            "scales",
        )
        scale_rounding: ScaleRounding = Field(
            "ceil",
            description="how to round the scales of mxfp4 to powers of two; ceil: no weight is cut off; "
            "floor: the rule of the standard",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return packed_shape(shape, layout_of(shape, options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state, layout_of)
        for layer in model.walk(journal, label=f"rounding to {options.type}"):
            for paths in linears_by_input(model.anatomy, layer.linears):
                dense = {
                    name: weight(layer.linears[path]) for path, name in packer.wanted(layer, paths).items()
                }
                largest = max((matrix.abs().max() for matrix in dense.values()), default=None)
                for name, matrix in dense.items():
                    rounded = quantize_float(
                        matrix, options.type, packer.scale_dtype(name), options.scale_rounding, largest, name
                    )
                    packer.write(name, matrix, rounded)
        report = packer.finish()
        report.summary = f"{options.type}: {report.summary}"
        return report


def layout_of(shape: ModelShape, options: RoundToFloat.Options) -> Layout:
    """The layout that the options ask for.

    Raises:
        BadInput: as in `layout_of_one`, or the groups of the type do not fit an input dimension.
    """
    layout = layout_of_one(shape, form := FloatFormat(options.type), options.ignore)
    for name, ((_, width), _) in stored_weights(shape, layout.linears).items():
        if form.group_size != CHANNEL and width % form.group_size:
            raise BadInput(
                f"The groups of {options.type} have {form.group_size} inputs, and the {width} inputs of "
                f"'{name}' are no multiple of that; use the type fp8, or leave out with 'ignore' what does "
                "not fit."
            )
    return layout
