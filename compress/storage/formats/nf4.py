"""How NF4 weights are stored: as transformers saves what bitsandbytes has made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.checkpoint import DTYPES, TensorInfo
from compress.storage.formats.base import Format, Get, expect

BLOCK, NESTED_BLOCK = 64, 256
STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass
class NF4Weight:
    """A weight [out, in], or some rows of one, in NF4.

    Attributes:
        codes: uint8 [out, in], each below 16.
        absmax: the scales of blocks of 64 as they are stored: float32, or uint8 with ``nested``.
        levels: float32 [16].
        dtype: what `dequantize` rounds to, as the library does: that of the weight before.
        nested: of uint8 scales: float32 scales [n], float32 levels [256], and the mean [1].
        first: weights of the first block that lie before these rows.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    dtype: torch.dtype
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def scales(self) -> torch.Tensor:
        """Of every block, float32."""
        if self.nested is None:
            return self.absmax
        scales, levels, mean = self.nested
        scales = scales.repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        return levels[self.absmax.int()] * scales + mean

    def dequantize(self) -> torch.Tensor:
        """Level times scale, rounded to ``dtype``, in float32 [out, in]."""
        scales = self.scales.repeat_interleave(BLOCK)[self.first :][: self.codes.numel()]
        return (self.levels[self.codes.int()] * scales.view(self.codes.shape)).to(self.dtype).float()

    def split(self, rows: list[int]) -> list[NF4Weight]:
        """Blocks of so many rows."""
        scales, parts, at = self.scales, [], self.first
        for codes in self.codes.split(rows):
            absmax = scales[at // BLOCK : -(-(at + codes.numel()) // BLOCK)]
            parts.append(NF4Weight(codes, absmax, self.levels, self.dtype, None, at % BLOCK))
            at += codes.numel()
        return parts

    def same_as(self, other: NF4Weight) -> bool:
        """Whether both hold the same bits."""
        mine, theirs = ((w.codes, w.absmax, w.levels, *(w.nested or ())) for w in (self, other))
        same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
        return same and self.dtype == other.dtype and self.absmax.dtype == other.absmax.dtype


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] below 16 -> uint8 [ceil(out·in / 2), 1], the first of two in the high half; the last
    may stand beside the code of 0."""
    flat = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2), value=7)
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)


def unpack_high_first(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack_high_first`."""
    flat = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).flatten()
    return flat[: shape[0] * shape[1]].view(shape)


class NF4Format(Format):
    """What transformers saves of a model loaded with ``BitsAndBytesConfig(load_in_4bit=True)``.

    ``weight`` uint8 [ceil(out·in / 2), 1]; ``weight.absmax``; ``weight.quant_map`` float32 [16]; with
    double quantization ``weight.nested_absmax`` and ``weight.nested_quant_map``; and the rest as JSON in
    bytes, filled up with spaces, so that their number does not depend on the weights.
    """

    name = "bitsandbytes"
    marker = "weight.quant_map"

    def __init__(self, double_quant: bool, compute_dtype: str) -> None:
        super().__init__(4, BLOCK, symmetric=False)
        self.double_quant, self.compute_dtype = double_quant, compute_dtype

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _state(self, shape: tuple[int, int], dtype: torch.dtype, mean: float) -> bytes:
        state = {"quant_type": "nf4", "blocksize": BLOCK}
        state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        if not self.double_quant:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
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
            found[f"{name}.weight.nested_absmax"], found[f"{name}.weight.nested_quant_map"], mean = (
                weight.nested
            )
            mean = mean.item()
        state = self._state(weight.shape, weight.dtype, mean)
        return found | {f"{name}.{STATE}": torch.frombuffer(bytearray(state), dtype=torch.uint8)}

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK)
        state = self._state(shape, DTYPES[weight_dtype], 0.0)
        infos = {
            f"{name}.weight": TensorInfo("U8", (-(-count // 2), 1)),
            f"{name}.weight.absmax": TensorInfo("U8" if self.double_quant else "F32", (blocks,)),
            f"{name}.weight.quant_map": TensorInfo("F32", (16,)),
            f"{name}.{STATE}": TensorInfo("U8", (len(state),)),
        }
        if self.double_quant:
            infos[f"{name}.weight.nested_absmax"] = TensorInfo("F32", (-(-blocks // NESTED_BLOCK),))
            infos[f"{name}.weight.nested_quant_map"] = TensorInfo("F32", (256,))
        return infos

    def read(self, name: str, get: Get) -> NF4Weight:
        try:
            state = json.loads(bytes(get(f"{name}.{STATE}").tolist()))
            shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
            sizes = (state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK))
            mean = state.get("nested_offset")
        except (ValueError, KeyError, AttributeError):
            raise BadInput(f"The tensor '{name}.{STATE}' is not bitsandbytes' description.") from None
        if sizes != (BLOCK, NESTED_BLOCK):
            raise BadInput(f"'{name}' has NF4 blocks of {sizes[0]} weights; only {BLOCK} can be read here.")
        packed, absmax = get(f"{name}.weight"), get(f"{name}.weight.absmax")
        count = shape[0] * shape[1]
        expect(f"{name}.weight", packed, (-(-count // 2), 1))
        expect(f"{name}.weight.absmax", absmax, (-(-count // BLOCK),))
        nested = None
        if absmax.dtype == torch.uint8:
            nested = (
                get(f"{name}.weight.nested_absmax"),
                get(f"{name}.weight.nested_quant_map"),
                torch.tensor([mean]),
            )
        levels = get(f"{name}.weight.quant_map")
        return NF4Weight(unpack_high_first(packed, shape), absmax, levels, dtype, nested)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, NF4Format],
        around: Mapping[str, NF4Format],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        form = next(iter(linears.values()))
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": form.double_quant,
            "bnb_4bit_compute_dtype": form.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [*outside, *skipped],
        }

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Format]]:
        if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
            raise BadInput("Of bitsandbytes checkpoints only NF4 and LLM.int8() can be read.")
        if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise BadInput("Of bitsandbytes checkpoints only those stored as uint8 can be read.")
        double = bool(config.get("bnb_4bit_use_double_quant"))
        return [(["Linear"], cls(double, config.get("bnb_4bit_compute_dtype", "float32")))]
