"""The format of AWQ checkpoints, which transformers and vLLM load."""

from __future__ import annotations

from dataclasses import replace

import torch

from compress.export.base import TargetOptions
from compress.export.codes import fewest_bits, integer_codes, widened, with_scales
from compress.export.model import ExportedModel
from compress.export.repack import RepackedTarget, Stored, integers
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.formats.awq import AWQFormat
from compress.storage.formats.base import Format


class AWQ(RepackedTarget[TargetOptions]):
    """Integers of 4 bits in the "gemm" layout, with scales in float16.

    It is a layout and not the method: codes of any method are stored in it.
    """

    name = "awq"
    summary = "integers of 4 bits in the layout of AutoAWQ (gemm)"
    runtime = "transformers with gptqmodel"
    how = "run 'compress-model quantize --method awq --bits 4'"

    def stored(self, model: ExportedModel, name: str, form: Format, options: TargetOptions) -> Stored:
        if not integer_codes(form) or fewest_bits(form.bits, AWQFormat.widths) is None:
            raise self.no_codes(name, form)
        return Stored(AWQFormat(4, form.group_size), "F16")

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        found = integers(name, weight, self.name)
        found = with_scales(found, torch.float16, name, self._found, "export it as compressed-tensors")
        return replace(widened(found, 4), symmetric=False)
