"""The format of NF4 weights: what transformers saves after bitsandbytes has quantized a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    NF4Weight,
    pack_high_first,
    unpack_high_first,
)
from compress.storage.formats.base import Format, Get, expect
from compress.storage.tensors import DTYPE_NAMES, DTYPES, TensorInfo

STATE = "weight.quant_state.bitsandbytes__"
"""The tensor that holds the remaining settings of a linear as JSON, less the quantization type."""
TYPES = ("nf4", "fp4")
"""The quantization types: what the 16 codes stand for is stored with every weight."""


class NF4Format(Format[NF4Weight]):
    """What transformers saves for a model loaded with ``BitsAndBytesConfig(load_in_4bit=True)``.

    The tensors of a linear are ``weight`` uint8 [ceil(out·in / 2), 1]; ``weight.absmax`` [ceil(out·in / 64)],
    float32, or uint8 with double quantization; ``weight.quant_map`` float32 [16]; with double quantization
    ``weight.nested_absmax`` float32 and ``weight.nested_quant_map`` float32 [256]; and the remaining settings
    as the bytes of a JSON document. With double quantization these are filled up with spaces, so that their
    number does not depend on the weights.

    Args:
        double_quant: whether the scales are quantized as well.
        compute_dtype: what bitsandbytes multiplies in, such as ``bfloat16``.
        quant_type: ``nf4`` or ``fp4``.
    """

    name = "bitsandbytes"
    marker = "weight.quant_map"
    any_length = tuple(f"{STATE}{kind}" for kind in TYPES)

    def __init__(self, double_quant: bool, compute_dtype: str, quant_type: str = "nf4") -> None:
        super().__init__(4, BLOCK_SIZE, symmetric=False)
        self.double_quant, self.compute_dtype, self.quant_type = double_quant, compute_dtype, quant_type

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _state(self, shape: tuple[int, int], dtype: torch.dtype, mean: float) -> bytes:
        """The content of `STATE`."""
        state = {"quant_type": self.quant_type, "blocksize": BLOCK_SIZE}
        state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        if not self.double_quant:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": 0.0}
        room = len(json.dumps(state)) + 32
        return json.dumps(state | {"nested_offset": mean}).encode().ljust(room)

    def tensors(self, name: str, weight: NF4Weight) -> dict[str, torch.Tensor]:
        found = {
            f"{name}.weight": pack_high_first(weight.codes),
            f"{name}.weight.absmax": weight.absmax,
            f"{name}.weight.quant_map": weight.levels,
        }
        mean = 0.0
        if weight.nested is not None:
            scales, levels, offset = weight.nested
            found |= {f"{name}.weight.nested_absmax": scales, f"{name}.weight.nested_quant_map": levels}
            mean = offset.item()
        state = self._state(weight.shape, weight.dtype, mean)
        return found | {
            f"{name}.{STATE}{self.quant_type}": torch.frombuffer(bytearray(state), dtype=torch.uint8)
        }

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK_SIZE)
        state = self._state(shape, DTYPES[weight_dtype], 0.0)
        infos = {
            f"{name}.weight": TensorInfo("U8", (-(-count // 2), 1)),
            f"{name}.weight.absmax": TensorInfo("U8" if self.double_quant else "F32", (blocks,)),
            f"{name}.weight.quant_map": TensorInfo("F32", (16,)),
            f"{name}.{STATE}{self.quant_type}": TensorInfo("U8", (len(state),)),
        }
        if self.double_quant:
            infos[f"{name}.weight.nested_absmax"] = TensorInfo("F32", (-(-blocks // NESTED_BLOCK_SIZE),))
            infos[f"{name}.weight.nested_quant_map"] = TensorInfo("F32", (256,))
        return infos

    def read(self, name: str, get: Get) -> NF4Weight:
        try:
            state = json.loads(bytes(get(f"{name}.{STATE}{self.quant_type}").tolist()))
            out, width = map(int, state["shape"])
            shape, dtype = (out, width), DTYPES[DTYPE_NAMES[getattr(torch, state["dtype"])]]
            sizes = (state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK_SIZE))
            mean = float(state["nested_offset"]) if self.double_quant else 0.0
        except (ValueError, KeyError, AttributeError, TypeError):
            raise BadInput(
                f"The tensor '{name}.{STATE}{self.quant_type}' is not a quantization state of bitsandbytes."
            ) from None
        if sizes != (BLOCK_SIZE, NESTED_BLOCK_SIZE):
            raise BadInput(f"'{name}' has NF4 blocks of {sizes[0]} weights; only {BLOCK_SIZE} can be read.")
        packed, absmax = get(f"{name}.weight"), get(f"{name}.weight.absmax")
        count = shape[0] * shape[1]
        expect(f"{name}.weight", packed, (-(-count // 2), 1))
        expect(f"{name}.weight.absmax", absmax, (-(-count // BLOCK_SIZE),))
        nested = None
        if absmax.dtype == torch.uint8:
            nested = (
                get(f"{name}.weight.nested_absmax"),
                get(f"{name}.weight.nested_quant_map"),
                torch.tensor([mean], device=absmax.device),
            )
        levels = get(f"{name}.weight.quant_map")
        return NF4Weight(unpack_high_first(packed, shape), absmax, levels, dtype, nested)

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
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": form.quant_type,
            "bnb_4bit_use_double_quant": form.double_quant,
            "bnb_4bit_compute_dtype": form.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [*outside, *skipped],
        }

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit") or kind not in TYPES:
            raise BadInput("Checkpoints of bitsandbytes can be read only if they are NF4, FP4 or LLM.int8().")
        if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise BadInput("4-bit checkpoints of bitsandbytes can be read only if they are stored as uint8.")
        double = bool(config.get("bnb_4bit_use_double_quant"))
        return [(["Linear"], cls(double, config.get("bnb_4bit_compute_dtype", "float32"), kind))]
