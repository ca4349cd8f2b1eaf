"""Rounding to FP8, MXFP4 and NVFP4: what hardware multiplies, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from compress.anatomy import linears_by_input, weight
from compress.kernels.codes.floating import FloatType, ScaleRounding, quantize_float
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.quantization.parts.layout import Layout, layout_of_one, packed_shape
from compress.quantization.parts.packer import Packer
from compress.storage.formats.floating import FloatFormat

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class FloatOptions(MethodOptions):
    """Which numbers, and which linears are left alone."""

    type: FloatType = Field(
        "fp8",
        description="fp8: E4M3, a scale a row, and activations in FP8, too, a scale a token; mxfp4: E2M1 in "
        "blocks of 32 under powers of two; nvfp4: E2M1 in blocks of 16 under E4M3 scales",
    )
    scale_rounding: ScaleRounding = Field(
        "ceil",
        description="of mxfp4, to a power of two: ceil cuts no weight off; floor is the standard's rule",
    )
    ignore: list[str] = Field(
        [], description="linears to keep: full names, globs, or regular expressions after 're:'"
    )


class RoundToFloat(Method):
    """Round every weight of the layers to the nearest low-bit floating-point number; no calibration.

    See `quantize_float` for the scales. Linears that runtimes fuse (query, key and value; gate and up) share
    the global scale of NVFP4. What is written is what llm-compressor's FP8_DYNAMIC, MXFP4A16 and NVFP4A16
    write; it is read back and compared at once.
    """

    name = "float"
    family = "quantization"
    paper = Paper("Microscaling Data Formats for Deep Learning", "2310.10537")
    needs_calibration = False

    Options = FloatOptions

    def plan(self, shape: ModelShape, options: FloatOptions) -> ModelShape:
        return packed_shape(shape, layout_of(shape, options))

    def apply(self, model: StreamedModel, options: FloatOptions, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state, layout_of)
        for layer in model.walk(journal, label=f"rounding to {options.type}"):
            for paths in linears_by_input(model.anatomy, layer.linears):
                stored = {path: layer.stored(path) for path in paths}
                dense = {
                    name: weight(layer.linears[path]) for path, name in stored.items() if packer.wants(name)
                }
                largest = max((matrix.abs().max() for matrix in dense.values()), default=None)
                for name, matrix in dense.items():
                    scale_dtype = packer.scale_dtype(name)
                    packer.write(
                        name,
                        matrix,
                        quantize_float(
                            matrix, options.type, scale_dtype, options.scale_rounding, largest, name
                        ),
                    )
        report = packer.finish()
        report.summary = f"{options.type}: {report.summary}"
        return report


def layout_of(shape: ModelShape, options: FloatOptions) -> Layout:
    """What the options ask for.

    Raises:
        BadInput: as `layout_of_one`.
    """
    form = FloatFormat(options.type)
    return layout_of_one(shape, form, options.ignore)
