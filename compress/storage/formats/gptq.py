"""The format of GPTQ checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.affine import AffineWeight
from compress.kernels.codes.integer import QuantizedWeight, number_of_groups
from compress.kernels.codes.packing import pack, pack_gptq_zeros, packed_width, unpack, unpack_gptq_zeros
from compress.storage.formats.base import Get, IntegerFormat, expect
from compress.storage.tensors import TensorInfo


class GPTQFormat(IntegerFormat):
    """The GPTQ layout (AutoGPTQ, GPTQModel, optimum) for 2, 3, 4 and 8 bits.

    The tensors of a linear are ``qweight`` int32 [in·b/32, out], ``qzeros`` int32 [groups, out·b/32],
    ``scales`` float16 [groups, out] and ``g_idx`` int32 [in], the group of each input. Where groups do not
    follow each other (``desc_act``), or zero points are not those of a symmetric file, the weight is an
    `AffineWeight`.

    Args:
        bits, group_size, symmetric: as in `Format`.
        version: 1 stores zero points minus one and is read by all loaders, but cannot hold a zero point of 0;
            2 stores zero points (``gptq_v2``). None takes 1 for symmetric weights, else 2.
    """

    name = "gptq"
    marker = "qweight"
    widths = (2, 3, 4, 8)

    def __init__(self, bits: int, group_size: int, symmetric: bool, version: int | None = None) -> None:
        super().__init__(bits, group_size, symmetric)
        self.version = version or (1 if symmetric else 2)

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def tensors(self, name: str, weight: QuantizedWeight | AffineWeight) -> dict[str, torch.Tensor]:
        if isinstance(weight, AffineWeight):
            assert weight.zeros is not None
            zeros, groups = weight.zeros, weight.groups
        else:
            self.check(weight)
            zeros, groups = weight.zeros, self._group_index(weight.shape[1], name)
        self._check_shape(name, weight.shape)
        return {
            f"{name}.qweight": pack(weight.codes, self.bits).t().contiguous(),
            f"{name}.qzeros": pack_gptq_zeros(zeros, self.bits, self.version),
            f"{name}.scales": weight.scales.to(torch.float16).t().contiguous(),
            f"{name}.g_idx": groups,
        }

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        self._check_shape(name, shape)
        out, width = shape
        groups = number_of_groups(width, self.group_size, name)
        return {
            f"{name}.qweight": TensorInfo("I32", (packed_width(width, self.bits), out)),
            f"{name}.qzeros": TensorInfo("I32", (groups, packed_width(out, self.bits))),
            f"{name}.scales": TensorInfo("F16", (groups, out)),
            f"{name}.g_idx": TensorInfo("I32", (width,)),
        }

    def read(self, name: str, get: Get) -> QuantizedWeight | AffineWeight:
        qweight, scales, qzeros = get(f"{name}.qweight"), get(f"{name}.scales"), get(f"{name}.qzeros")
        out, width = qweight.shape[1], qweight.shape[0] * 32 // self.bits
        groups = number_of_groups(width, self.group_size, name)
        expect(f"{name}.scales", scales, (groups, out))
        expect(f"{name}.qzeros", qzeros, (groups, packed_width(out, self.bits)))
        index = get(f"{name}.g_idx").to(torch.int32)
        expect(f"{name}.g_idx", index, (width,))
        codes = unpack(qweight.t(), self.bits, width).contiguous()
        zeros = unpack_gptq_zeros(qzeros, self.bits, out, self.version)
        if bool(((index < 0) | (index >= groups)).any()):
            raise BadInput(f"The tensor '{name}.g_idx' names groups that '{name}' does not have.")
        shuffled = not torch.equal(index, self._group_index(width, name).to(index.device))  # desc_act
        # Files of some writers, ApiQ's among them, call other zero points symmetric, too.
        if shuffled or (self.symmetric and bool((zeros != 2 ** (self.bits - 1)).any())):
            return AffineWeight(codes, scales.t().contiguous(), zeros, None, index, self.bits)
        return QuantizedWeight(
            codes, scales.t().contiguous(), zeros, self.bits, self.group_size, self.symmetric
        )

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        form, *others = dict.fromkeys(linears.values())
        if others or around:
            what = "several bit widths or group sizes" if others else "a packed head or embedding"
            raise BadInput(f"The format gptq cannot store {what}; use the format compressed-tensors.")
        config: dict[str, Any] = {
            "quant_method": cls.name,
            "bits": form.bits,
            "group_size": form.group_size,
            "sym": form.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if form.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
        }
        if skipped:
            # GPTQModel and vLLM read the first entry. Optimum (transformers) reads the second, and compares
            # only the ends of names.
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
            config["modules_in_block_to_quantize"] = [list(linears)]
        return config

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        layout = config.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise BadInput(f"GPTQ checkpoints in the layout '{layout}' cannot be read.")
        if any(not pattern.startswith("-:") for pattern in config.get("dynamic") or {}):
            raise BadInput("GPTQ checkpoints of several bit widths cannot be read.")
        form = cls(
            config["bits"],
            config.get("group_size", 128),
            config.get("sym", True),
            version=1 if layout == "gptq" else 2,
        )
        return [(["Linear"], form)]

    def _check_shape(self, name: str, shape: tuple[int, int]) -> None:
        for axis, size in zip(("output", "input"), shape, strict=True):
            if size * self.bits % 32 or (self.bits == 3 and size % 32):
                step = 32 if self.bits == 3 else 32 // self.bits
                raise BadInput(
                    f"GPTQ at {self.bits} bits needs dimensions that are multiples of {step}, and the {axis} "
                    f"dimension of '{name}' is {size}; ignore that linear, or use another format."
                )

    def _group_index(self, width: int, name: str) -> torch.Tensor:
        groups = number_of_groups(width, self.group_size, name)
        return torch.arange(width, dtype=torch.int32) // (width // groups)
