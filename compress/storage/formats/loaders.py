"""Which other programs can load what is written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.storage.formats.awq import AWQFormat
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.mlx import MLXFormat
from compress.storage.formats.nf4 import NF4Format
from compress.storage.formats.table import Formats

ON_A_GPU, NOT_AVX512 = "on a GPU", "(not on CPUs with AVX-512)"
"""The machines on which something works, if not on all."""


@dataclass(frozen=True)
class LoadsWith:
    """Which programs besides compress-model can load a model; ``str()`` gives it as a sentence.

    Attributes:
        transformers: whether stock transformers can.
        packages: what is needed besides transformers, or what loads the model without transformers. Empty
            without transformers: compress-model only.
        where: the machines on which that works, if not on all: `ON_A_GPU`, `NOT_AVX512` or empty.
        in_half_precision: whether these programs round weights or activations in another way than we do, by
            about as much as 16-bit floating point does, even if they are asked for float32.
        eight_bit_inputs: whether they round the inputs of linears to 8 bits. Where the last bit of an input
            differs, its code may be another one, so differences grow from layer to layer.
        trust_remote_code: whether the model brings modelling code with it.
        adapter: whether peft is needed for an adapter.
        key_value_bits: bits of the keys and values, which are quantized in compress-model only; or None.
        at_inference: methods that act on what the model computes and are not in its weights. A file in
            another format would hold the model without them, so no export may write one.
    """

    transformers: bool = True
    packages: tuple[str, ...] = ()
    where: str = ""
    in_half_precision: bool = False
    eight_bit_inputs: bool = False
    trust_remote_code: bool = False
    adapter: bool = False
    key_value_bits: int | None = None
    at_inference: tuple[str, ...] = ()

    @property
    def compress_model_only(self) -> bool:
        """Whether no other program can load the model."""
        return not self.transformers and not self.packages

    @property
    def programs(self) -> tuple[str, ...]:
        """The packages that have to be installed to load the model, by their names on PyPI."""
        first = ("transformers",) if self.transformers else ()
        return (*first, *self.packages, *(("peft",) if self.adapter else ()))

    def __str__(self) -> str:
        if self.compress_model_only:
            names = " and ".join(self.at_inference)
            return "compress-model only" + (f" ({names} at inference)" if names else "")
        programs = [" and ".join(self.packages)] if self.packages else []
        sentence = " with ".join(["transformers", *programs] if self.transformers else programs)
        if self.where:
            sentence += f" {self.where}"
        if self.trust_remote_code:
            sentence += " (trust_remote_code=True)"
        if self.adapter:
            sentence += ", and peft for the adapter"
        if self.key_value_bits is not None:
            sentence += f" ({self.key_value_bits}-bit keys and values with compress-model only)"
        return sentence


COMPRESS_MODEL_ONLY = LoadsWith(transformers=False)
MLX = LoadsWith(transformers=False, packages=("mlx-lm",))


def loads_with(
    quantization_config: Mapping[str, Any],
    conv1d: bool = False,
    packed_embedding: bool = False,
    flat_inputs: bool = False,
    linears: Iterable[tuple[int, int]] = (),
) -> LoadsWith:
    """Which programs besides compress-model can load weights with this ``quantization_config``.

    `scripts/benchmarks/loaders.py` tries what is said here. Programs that were not tried are not named.

    Args:
        quantization_config: of config.json, of any format but stacks.
        conv1d: whether the quantized linears are ``Conv1D`` modules in transformers (GPT-2). Transformers
            replaces these by packed ones of bitsandbytes only.
        packed_embedding: whether the token embedding is packed.
        flat_inputs: whether a quantized linear is given inputs [N·S, D] of two dimensions. The
            compressed-tensors library then quantizes inputs with one scale for all tokens of a batch, instead
            of one for each, so that its results depend on the batch and differ from ours.
        linears: (out_features, in_features) of those inside the layers.
    """
    forms = [form for _, form in Formats(quantization_config).groups]
    first, *others = forms
    if first.name == CompressedTensorsFormat.name:
        # Transformers decodes everything by the settings of one group, except plain symmetric linears.
        plain = not packed_embedding and all(form.symmetric for form in (first, *others))
        groups = quantization_config["config_groups"].values()
        inputs = any(group.get("input_activations") for group in groups)
        # Its integer grid for inputs has steps of the largest one / 127.5 where ours has / 127. That is no
        # more than what 8 bits lose anyway; with fewer bits (7.5 and 7) it is another model.
        input_bits = {form.activation_bits for form in forms} - {None}
        if conv1d or (others and not plain) or (inputs and flat_inputs) or input_bits - {8}:
            return COMPRESS_MODEL_ONLY
        # Asked to unpack all weights at once, the library does so in 16 bits.
        rounded = bool(quantization_config.get("dequantize") or input_bits)
        return LoadsWith(
            packages=("compressed-tensors",), in_half_precision=rounded, eight_bit_inputs=bool(input_bits)
        )
    if first.name == NF4Format.name:
        # If blocks of NF4 run on from row to row, bitsandbytes takes scales from wrong blocks on CPUs with
        # AVX-512. Its kernel for bfloat16 fails there, and also without whole blocks of 32 rows.
        whole = all(out % 32 == 0 and width % 64 == 0 for out, width in linears)
        where = "" if first.bits == 8 or whole else NOT_AVX512
        return LoadsWith(
            packages=("bitsandbytes",),
            where=where,
            in_half_precision=True,
            eight_bit_inputs=first.bits == 8,  # LLM.int8()
        )
    if first.name == MLXFormat.name:
        return MLX
    if conv1d:
        return LoadsWith(transformers=False, packages=("gptqmodel",), in_half_precision=True)
    if first.name == AWQFormat.name:
        return LoadsWith(packages=("gptqmodel",), in_half_precision=True)
    # The 4-bit kernel of GPTQModel for CPUs takes groups of 32 to 256 only.
    where = ON_A_GPU if first.bits == 4 and first.group_size not in (32, 64, 128, 256) else ""
    return LoadsWith(packages=("optimum", "gptqmodel"), where=where, in_half_precision=True)
