"""The format of GPTQ checkpoints, which transformers, vLLM, SGLang and GPTQModel load."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compress.errors import BadInput
from compress.export.base import TargetOptions
from compress.export.codes import fewest_bits, integer_codes, widened, with_scales
from compress.export.model import ExportedModel
from compress.export.repack import RepackedTarget, Stored, integers
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.formats.base import Format
from compress.storage.formats.gptq import GPTQFormat

INSTEAD = "export it as compressed-tensors"


class GPTQOptions(TargetOptions):
    """Which of the two layouts is written."""

    version: Literal[1, 2] | None = Field(
        None,
        description="1 stores zero points minus one, which every program reads, but cannot hold a zero point "
        "of 0; 2 stores them as they are; 1 for symmetric codes and else 2 if it is not given",
    )


class GPTQ(RepackedTarget[GPTQOptions]):
    """Integers of 2, 3, 4 or 8 bits, the same for all linears, with scales in float16."""

    name = "gptq"
    summary = "integers of 2, 3, 4 or 8 bits in the layout of GPTQ, version 1 or 2"
    runtime = "transformers with optimum and gptqmodel"
    how = "run 'compress-model quantize --method gptq --format gptq'"
    has_adapters = True
    has_conv1d = True
    Options = GPTQOptions

    def stored(self, model: ExportedModel, name: str, form: Format, options: GPTQOptions) -> Stored:
        bits = fewest_bits(form.bits, GPTQFormat.widths)
        if not integer_codes(form) or bits is None:
            raise self.no_codes(name, form)
        widths = {each.bits for linear, each in model.packed.items() if linear in model.linears}
        if len(widths) > 1:
            raise BadInput(
                f"'{model.source.id}' has linears of {', '.join(map(str, sorted(widths)))} bits, and a GPTQ "
                f"checkpoint has one width; {INSTEAD}, which has several."
            )
        return Stored(GPTQFormat(bits, form.group_size, form.symmetric, options.version), "F16")

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        found, form = integers(name, weight, self.name), stored.form
        assert isinstance(form, GPTQFormat)
        if form.version == 1 and bool((found.zeros == 0).any()):
            raise BadInput(
                f"'{name}' has zero points of 0, which version 1 of the GPTQ layout cannot store, because it "
                "stores zero points minus one; use --version 2."
            )
        found = with_scales(found, torch.float16, name, self._found, INSTEAD)
        return widened(found, form.bits)
