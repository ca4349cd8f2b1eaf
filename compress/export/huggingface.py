"""The plain format: dense safetensors, which every program that knows the architecture loads."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compress.engine.key_values import KEY
from compress.export.base import FolderTarget, TargetOptions
from compress.export.converted import Converted, Made
from compress.export.model import ExportedModel
from compress.storage import adapter
from compress.storage.tensors import DTYPE_NAMES, TensorInfo


class HuggingFaceOptions(TargetOptions):
    """How dense weights are stored."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights; the model's own if it is not given"
    )


class HuggingFace(FolderTarget[HuggingFaceOptions]):
    """Dense weights in safetensors under the names of transformers.

    What is packed or stored in blocks is unpacked, and an adapter is added to the weights it belongs to.
    Where layers differ in shape, the modelling file goes with the model.
    """

    name = "huggingface"
    summary = "dense safetensors: what is packed is unpacked"
    runtime = "transformers"
    Options = HuggingFaceOptions

    def converted(
        self, model: ExportedModel, options: HuggingFaceOptions
    ) -> tuple[Converted, tuple[str, ...]]:
        dtype = getattr(torch, options.dtype) if options.dtype else model.dtype
        names = [*model.packed, *model.stacked]
        gone = {key for name in names for key in model.tensors_of(name)}
        config = {
            key: value
            for key, value in model.checkpoint.config.items()
            if key not in ("quantization_config", "quantization", adapter.KEY, KEY, "torch_dtype")
        }
        config["dtype"] = str(dtype).removeprefix("torch.")
        found = Converted(
            model.checkpoint,
            config,
            [name for name in model.checkpoint.tensors if name not in gone],
            [unpacked(model, name, dtype) for name in names],
            DTYPE_NAMES[dtype] if options.dtype else None,
        )
        return found, rounding_notes(model)


def unpacked(model: ExportedModel, name: str, dtype: torch.dtype) -> Made:
    """The weight of a packed or stacked module as transformers stores it dense.

    A table that is both head and embedding gets the name of the embedding, where loaders look first.
    """
    anatomy = model.shape.anatomy
    stored = model.table if anatomy.tied and name == anatomy.head else name
    transposed = anatomy.conv1d and name in model.linears
    size = model.size(name)

    def make() -> dict[str, torch.Tensor]:
        dense = model.dense(name).to(dtype)
        return {f"{stored}.weight": dense.t().contiguous() if transposed else dense}

    info = TensorInfo(DTYPE_NAMES[dtype], size[::-1] if transposed else size)
    return Made({f"{stored}.weight": info}, make)


def rounding_notes(model: ExportedModel) -> tuple[str, ...]:
    """What a model rounds when it runs, which dense weights alone do not hold, in sentences."""
    found = []
    if model.rounds_inputs:
        found.append("The inputs of linears, which the model rounds when it runs, are not rounded here.")
    if KEY in model.checkpoint.config:
        found.append(
            "Keys and values, which the model caches in few bits, are cached in full precision here."
        )
    return tuple(found)
