"""Low-rank adapters beside packed linears: how they are planned, and what they are learned with."""

from __future__ import annotations

import torch

from compress.anatomy import anatomy_of
from compress.engine.shape import ModelShape
from compress.quantization.parts.clipped import ClippedLinear
from compress.quantization.parts.packer import Packer
from compress.storage import adapter
from compress.storage.tensors import DTYPES, TensorInfo


def plan_adapters(dense: ModelShape, packed: ModelShape, rank: int, alpha: float) -> ModelShape:
    """The shape of a model with an adapter for every packed linear inside its layers.

    Args:
        dense: the shape of the model before anything was packed.
        packed: its shape with packed linears.
        rank: of every adapter.
        alpha: adapters are multiplied by alpha / rank.
    """
    own = anatomy_of(dense.pretrained_config)
    prefix = f"{dense.anatomy.prefix}." if dense.anatomy.prefix else ""
    infos: dict[str, TensorInfo] = {}
    for stored, (out, width) in dense.linears().items():
        if f"{stored}.weight" not in packed.tensors:
            # peft looks for modules, whose names may differ from those in the files.
            name = own.in_model(stored.removeprefix(prefix))
            dtype = adapter_dtype(dense.tensors[f"{stored}.weight"].dtype)
            infos[f"{name}{adapter.A}"] = TensorInfo(dtype, (rank, width))
            infos[f"{name}{adapter.B}"] = TensorInfo(dtype, (out, rank))
    names = dict.fromkeys(adapter.linear_of(name) for name in infos)
    others = [name for name, _ in dense.skeleton.named_modules() if name not in names]
    causal = own.kind == "decoder" and own.head is not None
    settings = adapter.adapter_config(rank, alpha, names, others, conv1d=own.conv1d, causal=causal)
    return packed.derive({**packed.config, adapter.KEY: settings}, add=infos)


def adapter_dtype(stored: str) -> str:
    """The dtype of the adapter of a weight stored as ``stored`` (both as safetensors spells them)."""
    return stored if stored in ("F16", "BF16") else "F32"


def clipped_linear(
    dense: torch.Tensor, stored: str, packer: Packer, rank: int, alpha: float, generator: torch.Generator
) -> ClippedLinear:
    """The `ClippedLinear` of a weight ``dense`` [out, in] whose tensor is called ``stored``."""
    form = packer.format_of(stored)
    return ClippedLinear(
        dense,
        rank,
        alpha,
        bits=form.bits,
        group_size=form.group_size,
        symmetric=form.symmetric,
        scale_dtype=packer.scale_dtype(stored),
        adapter_dtype=DTYPES[adapter_dtype(packer.before.tensors[stored].dtype)],
        generator=generator,
        name=stored.removesuffix(".weight"),
    )
