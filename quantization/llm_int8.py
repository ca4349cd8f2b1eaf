"""LLM.int8() (NeurIPS 2022), made by the bitsandbytes library and stored as transformers does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, NonNegativeFloat

from compress.errors import BadInput
from compress.kernels.codes.int8 import Int8Weight
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.quantization.parts.layout import Layout, layout_of_one, packed_shape
from compress.quantization.parts.packer import Packer
from compress.storage.formats.llm_int8 import Int8Format

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class Int8Options(MethodOptions):
    """Which inputs are outliers, and which linears are left alone."""

    threshold: NonNegativeFloat = Field(
        6.0, description="input channels that reach this magnitude are not rounded; 0 rounds all"
    )
    ignore: list[str] = Field(
        [], description="linears to keep: full names, globs, or regular expressions after 're:'"
    )


class LLMInt8(Method):
    """Multiply in 8 bits, but for the few input channels with outliers; no calibration.

    - Vector-wise quantization (section 3.1): row i of W becomes round(127 w / c_i) with c_i = max|w|, and
      every token of the input X round(127 x / r_t) with r_t = max|x|. X W^T is then their product in whole
      numbers times r_t c_i / 127^2.
    - Mixed-precision decomposition (section 3.2): O are the columns of X in which any token of the call has
      |x| >= ``threshold``. They are multiplied as they are by the same columns of W, dequantized, and the
      others in 8 bits.

    Weights are rounded now, by the library and from float16, as its own; inputs when the model runs (see
    the module ``int8_linear``). Since O depends on all tokens of a call, so do results, a little. The
    weights in the columns O are rounded, too: the paper keeps them in 16 bits, the library does not, and
    needs no calibration for it.
    """

    name = "llm-int8"
    family = "quantization"
    paper = Paper("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "2208.07339")
    needs_calibration = False
    needs_package = "bitsandbytes"

    Options = Int8Options

    def plan(self, shape: ModelShape, options: Int8Options) -> ModelShape:
        return packed_shape(shape, layout_of(shape, options))

    def apply(self, model: StreamedModel, options: Int8Options, context: StepContext) -> StepReport:
        journal = context.journal("rounding")
        packer = Packer(context.draft, options, journal.state, layout_of)
        for layer in model.walk(journal, label="rounding to 8 bits"):
            for stored, dense in packer.linears(model, layer):
                packer.write(stored, dense, quantize_int8(dense, options.threshold, stored))
        return packer.finish()


def layout_of(shape: ModelShape, options: Int8Options) -> Layout:
    """What the options ask for.

    Raises:
        BadInput: as `layout_of_one`.
    """
    return layout_of_one(shape, Int8Format(options.threshold), options.ignore)


def quantize_int8(dense: torch.Tensor, threshold: float, name: str) -> Int8Weight:
    """Round a weight [out, in] with bitsandbytes.

    Raises:
        BadInput: it does not fit into float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    half = dense.to(torch.float16).contiguous()
    if not half.isfinite().all():
        raise BadInput(
            f"The tensor '{name}' has values beyond float16, from which bitsandbytes rounds; use the method "
            "rtn with 8 bits."
        )
    codes, absmax, _ = int8_vectorwise_quant(half)
    codes[absmax == 0] = 0  # 0 / 0 in the library
    return Int8Weight(codes, absmax, threshold)
