"""LLM.int8() (NeurIPS 2022), computed by the bitsandbytes library and stored as transformers stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, NonNegativeFloat

from compress.errors import BadInput
from compress.kernels.codes.int8 import Int8Weight
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.layout import Layout, layout_of_one, packed_shape
from compress.quantization.parts.options import IgnoreOptions
from compress.quantization.parts.packer import Packer
from compress.storage.formats.llm_int8 import Int8Format

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class LLMInt8(Method["LLMInt8.Options"]):
    """Multiply in 8 bits, except for the few input channels with outliers; no calibration.

    - Vector-wise quantization (section 3.1): row i of W becomes round(127 w / c_i) with c_i = max|w|, and
      every token of the input X becomes round(127 x / r_t) with r_t = max|x|. X W^T is then their product in
      whole numbers times r_t c_i / 127^2.
    - Mixed-precision decomposition (section 3.2): O are the columns of X in which any token of the call has
      |x| >= ``threshold``. They are multiplied as they are by the same columns of W, dequantized; all other
      columns are multiplied in 8 bits.

    Weights are rounded now, by the library and from float16, as the library's own are. Inputs are rounded
    when the model runs (see `compress.kernels.layers.int8_linear`). O depends on all tokens of a call, so
    results do so slightly as well. The weights in the columns O are rounded too: the paper keeps them in 16
    bits, but the library does not, and so it needs no calibration.
    """

    name = "llm-int8"
    family = "quantization"
    paper = Paper("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339")
    needs_calibration = False
    needs_package = "bitsandbytes"

    class Options(IgnoreOptions):
        threshold: NonNegativeFloat = Field(
            6.0,
            description="input channels that reach this magnitude are not rounded; 0: all channels are "
            "rounded",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return packed_shape(shape, layout_of(shape, options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state, layout_of)
        for layer in model.walk(journal, label="rounding to 8 bits"):
            for stored, dense in packer.linears(layer):
                packer.write(stored, dense, quantize_int8(dense, options.threshold, stored))
        return packer.finish()


def layout_of(shape: ModelShape, options: LLMInt8.Options) -> Layout:
    """The layout that the options ask for.

    Raises:
        BadInput: as in `layout_of_one`.
    """
    return layout_of_one(shape, Int8Format(options.threshold), options.ignore)


def quantize_int8(dense: torch.Tensor, threshold: float, name: str) -> Int8Weight:
    """Round a weight [out, in] with bitsandbytes.

    Raises:
        BadInput: a value is too large for float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    half = dense.to(torch.float16).contiguous()
    if not half.isfinite().all():
        raise BadInput(
            f"The tensor '{name}' has values too large for float16, from which bitsandbytes rounds; use the "
            "method rtn with 8 bits."
        )
    codes, absmax, _ = int8_vectorwise_quant(half)
    codes[absmax == 0] = 0  # 0 / 0 in the library
    return Int8Weight(codes, absmax, threshold)
