"""The format of LLM.int8() weights: what transformers saves after bitsandbytes has quantized a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.int8 import Int8Weight
from compress.kernels.codes.integer import CHANNEL
from compress.storage.formats.base import Format, Get, expect
from compress.storage.tensors import TensorInfo


class Int8Format(Format[Int8Weight]):
    """What transformers saves for a model loaded with ``BitsAndBytesConfig(load_in_8bit=True)``.

    The tensors of a linear are ``weight`` int8 [out, in]; ``SCB`` float32 [out], the largest magnitude of
    each row; and ``weight_format`` uint8 [], 0 for codes row after row. The threshold is in config.json.

    Args:
        threshold: inputs of at least this magnitude are not rounded; 0 rounds all inputs.
    """

    name = "bitsandbytes"
    marker = "SCB"

    def __init__(self, threshold: float) -> None:
        super().__init__(8, CHANNEL, symmetric=True)
        self.threshold = threshold

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def tensors(self, name: str, weight: Int8Weight) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": weight.codes,
            f"{name}.SCB": weight.absmax,
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        return {
            f"{name}.weight": TensorInfo("I8", shape),
            f"{name}.SCB": TensorInfo("F32", (shape[0],)),
            f"{name}.weight_format": TensorInfo("U8", ()),
        }

    def read(self, name: str, get: Get) -> Int8Weight:
        codes, absmax = get(f"{name}.weight"), get(f"{name}.SCB")
        if codes.dtype != torch.int8 or codes.ndim != 2:
            raise BadInput(f"The tensor '{name}.weight' is {codes.dtype} where int8 [out, in] was expected.")
        expect(f"{name}.SCB", absmax, (len(codes),))
        if int(get(f"{name}.weight_format")) != 0:
            raise BadInput(f"The codes of '{name}' are laid out for one kind of GPU and cannot be read.")
        return Int8Weight(codes, absmax.float(), self.threshold)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        form = next(iter(linears.values()))
        return {
            "quant_method": cls.name,
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": form.threshold,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": [*outside, *skipped],
        }

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        if config.get("llm_int8_has_fp16_weight"):
            raise BadInput("8-bit checkpoints of bitsandbytes can be read only if their weights are int8.")
        return [(["Linear"], cls(float(config.get("llm_int8_threshold", 6.0))))]
