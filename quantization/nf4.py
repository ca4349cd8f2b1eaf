"""NF4 of QLoRA (2023), computed by the bitsandbytes library and stored as transformers stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from compress.kernels.codes.nf4 import BLOCK_SIZE, NF4Weight, unpack_high_first
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.layout import Layout, layout_of_one, packed_shape
from compress.quantization.parts.options import IgnoreOptions
from compress.quantization.parts.packer import Packer
from compress.storage.formats.nf4 import NF4Format
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class NF4(Method["NF4.Options"]):
    """Round every weight of the layers to NormalFloat4, with one scale for 64 weights; no calibration.

    The 16 levels are quantiles of the normal distribution, scaled to [-1, 1], and include 0. A block of 64
    consecutive weights, row after row, has the scale max|w|. With ``double_quant`` the mean of the scales is
    subtracted, and the rest is rounded to 8 bits with one scale for 256 of them. bitsandbytes does the
    rounding, and the format is its own.
    """

    name = "nf4"
    family = "quantization"
    paper = Paper("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314")
    needs_calibration = False
    needs_package = "bitsandbytes"

    class Options(IgnoreOptions):
        double_quant: bool = Field(
            False, description="store scales in 8 bits: 4.13 bits per weight instead of 4.5"
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return packed_shape(shape, layout_of(shape, options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state, layout_of)
        for layer in model.walk(journal, label="rounding to NF4"):
            for stored, dense in packer.linears(layer):
                dtype = DTYPES[model.checkpoint.tensors[stored].dtype]
                packer.write(stored, dense, quantize_nf4(dense, dtype, options.double_quant))
        return packer.finish()


def layout_of(shape: ModelShape, options: NF4.Options) -> Layout:
    """The layout that the options ask for.

    Raises:
        BadInput: as in `layout_of_one`.
    """
    dtype = shape.config.get("dtype") or shape.config.get("torch_dtype")  # as older config.json say
    return layout_of_one(shape, NF4Format(options.double_quant, dtype or "float32"), options.ignore)


def quantize_nf4(dense: torch.Tensor, dtype: torch.dtype, double_quant: bool) -> NF4Weight:
    """Round a weight [out, in] with bitsandbytes, from the values that it has in ``dtype``."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        dense.to(dtype).contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type="nf4"
    )
    nested = None
    if double_quant:
        nested = (state.state2.absmax, state.state2.code, state.offset.reshape(1).float())
    out, width = dense.shape
    return NF4Weight(unpack_high_first(packed, (out, width)), state.absmax, state.code, dtype, nested)
