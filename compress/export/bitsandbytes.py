"""The format of bitsandbytes, which transformers loads."""

from __future__ import annotations

from compress.export.base import TargetOptions
from compress.export.model import ExportedModel
from compress.export.repack import RepackedTarget, Stored
from compress.storage.formats.base import Format
from compress.storage.formats.llm_int8 import Int8Format
from compress.storage.formats.nf4 import NF4Format
from compress.storage.tensors import DTYPE_NAMES


class BitsAndBytes(RepackedTarget[TargetOptions]):
    """4 bits on the levels of NF4 or FP4, or LLM.int8(). Codes of other formats do not lie on these."""

    name = "bitsandbytes"
    summary = "NF4 and LLM.int8()"
    runtime = "transformers with bitsandbytes"
    has_conv1d = True
    how = "run 'compress-model quantize' with --method nf4 or llm-int8"

    def stored(self, model: ExportedModel, name: str, form: Format, options: TargetOptions) -> Stored:
        if not isinstance(form, NF4Format | Int8Format):
            raise self.no_codes(name, form)
        return Stored(form, DTYPE_NAMES[model.dtype])

    def rounding(self, model: ExportedModel) -> tuple[str, ...]:
        return ()  # LLM.int8() rounds inputs here as well
