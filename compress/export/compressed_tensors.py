"""The format of the compressed-tensors library, which transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.engine.key_values import KEY
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.export.base import TargetOptions
from compress.export.codes import integer_codes
from compress.export.converted import Converted
from compress.export.model import ExportedModel
from compress.export.repack import PLAIN, RepackedTarget, Stored, dtype_of_scales, integers
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import DYNAMIC_TOKENS, CompressedTensorsFormat
from compress.storage.formats.floating import FloatFormat
from compress.storage.formats.int_quantized import IntQuantizedFormat


def _is_symmetric(model: ExportedModel, name: str) -> bool:
    """Whether the zero points of a module, which its format always stores, are all in the middle."""
    weight = model.codes(name)
    return isinstance(weight, QuantizedWeight) and bool((weight.zeros == 2 ** (weight.bits - 1)).all())


def _in_bytes(model: ExportedModel) -> bool:
    """Whether all that is packed is W8A8 with one scale for each row, which vLLM runs from bytes only."""
    return all(
        isinstance(form, CompressedTensorsFormat)
        and (form.bits, form.group_size, form.symmetric, form.activation_bits) == (8, CHANNEL, True, 8)
        for form in model.packed.values()
    )


class CompressedTensors(RepackedTarget[TargetOptions]):
    """Packed integers of 2 to 8 bits, with rounded inputs where the model has them, and FP8, MXFP4, NVFP4.

    Linears may differ in bits, and the head and the token embedding stay packed where transformers can load
    them. Codes of GPTQ, AWQ and mlx are carried over. Keys and values in few bits are declared as a
    ``kv_cache_scheme``.
    """

    name = "compressed-tensors"
    summary = "integers of 2 to 8 bits, W4A8, W8A8, FP8, MXFP4, NVFP4"
    runtime = "transformers with compressed-tensors"
    how = "make one with 'compress-model quantize'"
    has_adapters = True
    has_pruned = True
    rounds_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.packs_tables = True

    def converted(self, model: ExportedModel, options: TargetOptions) -> tuple[Converted, tuple[str, ...]]:
        found, notes = super().converted(model, options)
        if not ModelShape.of(found).loads_with.compress_model_only:
            return found, notes
        self.packs_tables = False  # transformers may load it without
        found, notes = super().converted(model, options)
        if ModelShape.of(found).loads_with.compress_model_only:
            raise BadInput(
                f"No other program loads the linears of '{model.source.id}' as compressed-tensors: it needs "
                "symmetric codes where they have several widths, inputs of 8 bits where these are rounded, "
                f"and inputs of three dimensions; {PLAIN}, or quantize with --symmetric."
            )
        return found, notes

    def stored(self, model: ExportedModel, name: str, form: Format, options: TargetOptions) -> Stored:
        scales = dtype_of_scales(model, name, form)
        if type(form) is CompressedTensorsFormat and _in_bytes(model):
            return Stored(IntQuantizedFormat(8, form.group_size, True, 8), scales)
        if isinstance(form, CompressedTensorsFormat | FloatFormat):
            return Stored(form, scales)
        if integer_codes(form):
            symmetric = form.symmetric if form.name == "gptq" else _is_symmetric(model, name)
            return Stored(CompressedTensorsFormat(form.bits, form.group_size, symmetric), scales)
        raise self.no_codes(name, form)

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        if isinstance(stored.form, FloatFormat):
            return weight
        return replace(integers(name, weight, self.name), symmetric=stored.form.symmetric)

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
