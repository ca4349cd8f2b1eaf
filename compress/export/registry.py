"""All formats that a model can be exported to, by name. They are imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from compress.errors import unknown

if TYPE_CHECKING:
    from compress.export.base import Target

TARGETS = {
    "gguf": "compress.export.gguf:GGUF",
    "imatrix": "compress.export.imatrix:Imatrix",
    "huggingface": "compress.export.huggingface:HuggingFace",
    "compressed-tensors": "compress.export.compressed_tensors:CompressedTensors",
    "gptq": "compress.export.gptq:GPTQ",
    "awq": "compress.export.awq:AWQ",
    "bitsandbytes": "compress.export.bitsandbytes:BitsAndBytes",
    "mlx": "compress.export.mlx:MLX",
    "onnx": "compress.export.onnx:ONNX",
    "nemotron-nas": "compress.export.nemotron_nas:NemotronNAS",
}
"""Name -> "module:Class"."""


def find_target(name: str) -> Target:
    """The target (an instance) of that name.

    Raises:
        BadInput: there is none.
    """
    if name not in TARGETS:
        raise unknown("format", name, TARGETS)
    module, _, attribute = TARGETS[name].partition(":")
    return getattr(import_module(module), attribute)()
