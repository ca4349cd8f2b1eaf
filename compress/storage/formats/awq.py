"""The format of AWQ checkpoints (AutoAWQ, GPTQModel)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import QuantizedWeight, number_of_groups
from compress.kernels.codes.packing import pack, unpack
from compress.storage.formats.base import Get, IntegerFormat, expect
from compress.storage.tensors import TensorInfo

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The place in a word is that of this output among eight, from the lowest four bits up."""


class AWQFormat(IntegerFormat):
    """The "gemm" layout of AWQ: 4 bits, packed along the output axis.

    The tensors of a linear are ``qweight`` int32 [in, out/8], ``qzeros`` int32 [groups, out/8] and ``scales``
    float16 [groups, out]. Eight outputs share a word, in the order `PLACES`. Zero points are always stored,
    as they are.

    Args:
        bits, group_size, symmetric: as in `Format`. Checkpoints do not say whether zero points are all 8.
    """

    name = "awq"
    marker = "qweight"
    widths = (4,)

    def __init__(self, bits: int, group_size: int, symmetric: bool = False) -> None:
        super().__init__(bits, group_size, symmetric)

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        self.check(weight)
        self._check_rows(name, weight.shape[0])
        return {
            f"{name}.qweight": _pack(weight.codes.t()),
            f"{name}.qzeros": _pack(weight.zeros.t()),
            f"{name}.scales": weight.scales.to(torch.float16).t().contiguous(),
        }

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        out, width = shape
        self._check_rows(name, out)
        groups = number_of_groups(width, self.group_size, name)
        return {
            f"{name}.qweight": TensorInfo("I32", (width, out // 8)),
            f"{name}.qzeros": TensorInfo("I32", (groups, out // 8)),
            f"{name}.scales": TensorInfo("F16", (groups, out)),
        }

    def read(self, name: str, get: Get) -> QuantizedWeight:
        qweight, qzeros, scales = (get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        if qweight.ndim != 2 or qweight.dtype != torch.int32:
            raise BadInput(f"The tensor '{name}.qweight' is not int32 [in, out/8].")
        width, out = qweight.shape[0], qweight.shape[1] * 8
        groups = number_of_groups(width, self.group_size, name)
        expect(f"{name}.qzeros", qzeros, (groups, out // 8))
        expect(f"{name}.scales", scales, (groups, out))
        codes, zeros = _unpack(qweight).t().contiguous(), _unpack(qzeros).t().contiguous()
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
            what = "several group sizes" if others else "a packed head or embedding"
            raise BadInput(f"The format awq cannot store {what}; use the format compressed-tensors.")
        return {
            "quant_method": cls.name,
            "bits": form.bits,
            "group_size": form.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*outside, *skipped],
        }

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if layout != "gemm":
            raise BadInput(f"AWQ checkpoints in the layout '{layout}' cannot be read; 'gemm' can.")
        bits = config.get("bits", config.get("w_bit", 4))
        size = config.get("group_size", config.get("q_group_size", 128))
        if not isinstance(bits, int) or not isinstance(size, int):
            raise BadInput("The quantization_config of this AWQ model does not give bits and group_size.")
        return [(["Linear"], cls(bits, size))]

    def _check_rows(self, name: str, out: int) -> None:
        if out % 8:
            raise BadInput(
                f"AWQ packs eight outputs into a word, and '{name}' has {out}; ignore that linear, or use "
                "the format compressed-tensors."
            )


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, out] -> int32 [rows, out/8]."""
    rows, out = codes.shape
    ordered = codes.reshape(rows, out // 8, 8)[:, :, list(PLACES)]
    return pack(ordered.reshape(rows, out).contiguous(), 4)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack`."""
    rows, count = words.shape
    stored = unpack(words, 4, count * 8).reshape(rows, count, 8)
    codes = torch.empty_like(stored)
    codes[:, :, list(PLACES)] = stored
    return codes.reshape(rows, count * 8)
