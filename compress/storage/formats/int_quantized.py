"""The format of the compressed-tensors library for integers that lie in bytes, as vLLM reads W8A8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import QuantizedWeight, number_of_groups
from compress.storage.formats.base import Get, expect
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.tensors import TensorInfo


class IntQuantizedFormat(CompressedTensorsFormat):
    """``int-quantized``: ``weight`` int8 [out, in], the codes less 2^(b−1), and ``weight_scale``.

    Scales are [out, groups] in the dtype of the model. Only symmetric codes are stored so.

    Args:
        bits, group_size, symmetric, activation_bits: as in `CompressedTensorsFormat`.

    Raises:
        BadInput: asymmetric codes.
    """

    marker = "weight_scale"
    layout = "int-quantized"

    def __init__(
        self, bits: int, group_size: int, symmetric: bool, activation_bits: int | None = None
    ) -> None:
        super().__init__(bits, group_size, symmetric, activation_bits)
        if not symmetric:
            raise BadInput(
                "Checkpoints in the format 'int-quantized' can be read only if they are symmetric."
            )

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        self.check(weight)
        codes = weight.codes.to(torch.int16) - 2 ** (self.bits - 1)
        return {f"{name}.weight": codes.to(torch.int8), f"{name}.weight_scale": weight.scales}

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        groups = number_of_groups(shape[1], self.group_size, name)
        dtype = weight_dtype if weight_dtype in ("F16", "BF16") else "F32"
        return {
            f"{name}.weight": TensorInfo("I8", shape),
            f"{name}.weight_scale": TensorInfo(dtype, (shape[0], groups)),
        }

    def read(self, name: str, get: Get) -> QuantizedWeight:
        stored, scales = get(f"{name}.weight"), get(f"{name}.weight_scale")
        if stored.dtype != torch.int8 or stored.ndim != 2:
            raise BadInput(f"The tensor '{name}.weight' is {stored.dtype} where int8 [out, in] was expected.")
        out, width = stored.shape
        expect(f"{name}.weight_scale", scales, (out, number_of_groups(width, self.group_size, name)))
        codes = stored.to(torch.int16) + 2 ** (self.bits - 1)
        if bool(((codes < 0) | (codes >= 2**self.bits)).any()):
            raise BadInput(f"The tensor '{name}.weight' holds codes of more than {self.bits} bits.")
        zeros = torch.full_like(scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        return QuantizedWeight(codes.to(torch.uint8), scales, zeros, self.bits, self.group_size, True)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        config = super().describe(linears, around, skipped, outside)
        config.pop("dequantize", None)
        return config
