"""Which other programs load what is written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compress.storage.formats.compressed_tensors import CompressedTensors
from compress.storage.formats.table import Formats


def loaders(
    quantization_config: Mapping[str, Any],
    conv1d: bool = False,
    packed_embedding: bool = False,
    linears: Iterable[tuple[int, int]] = (),
) -> str:
    """Who besides compress-model can load a model with this ``quantization_config``, for plans and cards.

    Tried with transformers 5.24, compressed-tensors 0.20, bitsandbytes 0.50, gptqmodel 7.6 and optimum 2.3.
    Nothing is said about programs that were not tried.

    Args:
        quantization_config: of config.json.
        conv1d: whether the quantized linears are ``Conv1D`` modules in transformers (GPT-2), which it
            replaces by packed ones of bitsandbytes only.
        packed_embedding: whether the token embedding is packed.
        linears: (out_features, in_features) of those inside the layers.
    """
    form, *others = (form for _, form in Formats(quantization_config).groups)
    if form.name == CompressedTensors.name:
        # Of what is not plain symmetric linears, transformers decodes all by one group's settings.
        plain = not packed_embedding and all(each.symmetric for each in (form, *others))
        stock = not conv1d and (plain or not others)
        return "transformers with compressed-tensors" if stock else "compress-model only"
    if form.name == "bitsandbytes":
        # With AVX-512 it takes scales of NF4 from wrong blocks where these go on from row to row, and its
        # kernel for bfloat16 stops there, as it does without whole blocks of 32 rows.
        whole = all(rows % 32 == 0 and columns % 64 == 0 for rows, columns in linears)
        where = "" if form.bits == 8 or whole else " (not on CPUs with AVX-512)"
        return f"transformers with bitsandbytes{where}"
    if conv1d:
        return "gptqmodel"
    # GPTQModel's 4-bit kernel for CPUs takes groups of 32 to 256 only.
    where = " on a GPU" if form.bits == 4 and form.group_size not in (32, 64, 128, 256) else ""
    return f"transformers with optimum and gptqmodel{where}"
