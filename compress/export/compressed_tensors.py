"""The format of the compressed-tensors library, which transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.engine.key_values import KEY
from compress.export.base import TargetOptions
from compress.export.codes import integer_codes
from compress.export.model import ExportedModel
from compress.export.repack import RepackedTarget, Stored, dtype_of_scales, integers
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import DYNAMIC_TOKENS, CompressedTensorsFormat
from compress.storage.formats.floating import FloatFormat
from compress.storage.formats.int_quantized import IntQuantizedFormat


def _in_bytes(model: ExportedModel) -> bool:
    """Whether all that is packed is W8A8 with one scale for each row, which vLLM runs from bytes only."""
    return all(
        isinstance(form, CompressedTensorsFormat)
        and (form.bits, form.group_size, form.symmetric, form.activation_bits) == (8, CHANNEL, True, 8)
        for form in model.packed.values()
    )


class CompressedTensors(RepackedTarget[TargetOptions]):
    """Packed integers of 2 to 8 bits, with rounded inputs where the model has them, and FP8, MXFP4 and NVFP4.

    Linears may differ in bits, and the head and the token embedding may be packed. Codes of GPTQ, AWQ and mlx
    are carried over. Keys and values in few bits are declared as a ``kv_cache_scheme``.
    """

    name = "compressed-tensors"
    summary = "integers of 2 to 8 bits, W4A8, W8A8, FP8, MXFP4, NVFP4"
    runtime = "transformers with compressed-tensors"
    how = "make one with 'compress-model quantize'"
    packs_tables = True
    has_adapters = True

    def stored(self, model: ExportedModel, name: str, form: Format, options: TargetOptions) -> Stored:
        scales = dtype_of_scales(model, name, form)
        if type(form) is CompressedTensorsFormat and _in_bytes(model):
            return Stored(IntQuantizedFormat(8, form.group_size, True, 8), scales)
        if isinstance(form, CompressedTensorsFormat | FloatFormat):
            return Stored(form, scales)
        if integer_codes(form):
            symmetric = form.symmetric and form.name == "gptq"
            return Stored(CompressedTensorsFormat(form.bits, form.group_size, symmetric), scales)
        raise self.no_codes(name, form)

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        return weight if isinstance(stored.form, FloatFormat) else integers(name, weight, self.name)

    def declared(
        self,
        config: dict[str, Any],
        linears: Mapping[str, Any],
        around: Mapping[str, Any],
        skipped: list[str],
        outside: list[str],
    ) -> dict[str, Any]:
        found = super().declared(config, linears, around, skipped, outside)
        if (cache := config.get(KEY)) is not None:
            scheme = {"num_bits": cache["bits"], **DYNAMIC_TOKENS}
            found["quantization_config"] = {**found["quantization_config"], "kv_cache_scheme": scheme}
        return found

    def rounding(self, model: ExportedModel) -> tuple[str, ...]:
        cache = model.checkpoint.config.get(KEY)
        if cache is None or (cache.get("scale"), cache.get("position")) == ("head", "after-rope"):
            return ()
        return (
            "Programs that follow the kv_cache_scheme round keys behind the rotary embedding, with one scale "
            "for each head; the model rounds them "
            f"{'before' if cache.get('position') == 'before-rope' else 'behind'} it, with one scale for each "
            f"{cache.get('scale')}.",
        )
