"""The format of quantized checkpoints of mlx-lm, which run on Apple machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.affine import AffineWeight
from compress.kernels.codes.integer import QuantizedWeight, number_of_groups
from compress.kernels.codes.packing import pack, packed_width, unpack
from compress.storage.formats.base import Format, Get, expect
from compress.storage.tensors import TensorInfo

SIZES = (32, 64, 128)
"""The group sizes that mlx has kernels for."""

MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""The architectures that were tried; mlx-lm has them under the same names of tensors."""


def check_architecture(model_type: str) -> None:
    """Make sure that mlx-lm has an architecture.

    Raises:
        BadInput: it has not.
    """
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise BadInput(f"mlx-lm has no {model_type} models with these names of tensors (it has {known}).")


class MLXFormat(Format[QuantizedWeight | AffineWeight]):
    """The affine quantization of mlx: Ŵ = scale · code + bias, in groups along the input axis.

    The tensors of a linear or a token embedding are ``weight`` uint32 [out, in·b/32], and ``scales`` and
    ``biases`` [out, groups] in the dtype of the model. A zero point z is stored as the bias −z · scale, which
    is rounded to that dtype unless it fits.

    Args:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
        symmetric: ignored; biases are always stored.
    """

    name = "mlx"
    marker = "scales"
    widths = (2, 3, 4, 5, 6, 8)

    def __init__(self, bits: int, group_size: int, symmetric: bool = False) -> None:
        super().__init__(bits, group_size, symmetric=False)
        if group_size not in SIZES:
            raise BadInput(f"mlx has groups of 32, 64 or 128 values, not of {group_size}.")

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16) else torch.float32

    def tensors(self, name: str, weight: QuantizedWeight | AffineWeight) -> dict[str, torch.Tensor]:
        if isinstance(weight, AffineWeight):
            assert weight.biases is not None
            biases = weight.biases
        else:
            biases = (-weight.zeros.float() * weight.scales.float()).to(weight.scales.dtype)
        return {
            f"{name}.weight": pack(weight.codes, self.bits).view(torch.uint32),
            f"{name}.scales": weight.scales.contiguous(),
            f"{name}.biases": biases.contiguous(),
        }

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        out, width = shape
        groups = number_of_groups(width, self.group_size, name)
        dtype = weight_dtype if weight_dtype in ("F16", "BF16") else "F32"
        return {
            f"{name}.weight": TensorInfo("U32", (out, packed_width(width, self.bits))),
            f"{name}.scales": TensorInfo(dtype, (out, groups)),
            f"{name}.biases": TensorInfo(dtype, (out, groups)),
        }

    def read(self, name: str, get: Get) -> QuantizedWeight | AffineWeight:
        packed, scales, biases = (get(f"{name}.{part}") for part in ("weight", "scales", "biases"))
        if packed.dtype != torch.uint32 or packed.ndim != 2:
            raise BadInput(f"The tensor '{name}.weight' is not uint32 [out, in·{self.bits}/32].")
        out, width = packed.shape[0], packed.shape[1] * 32 // self.bits
        groups = number_of_groups(width, self.group_size, name)
        expect(f"{name}.scales", scales, (out, groups))
        expect(f"{name}.biases", biases, (out, groups))
        codes = unpack(packed.view(torch.int32), self.bits, width).contiguous()
        # Where each bias is a zero point times the scale, the weight lies on our grid and runs natively.
        zeros = (-biases.float() / scales.float()).round()
        fits = bool(((zeros >= 0) & (zeros < 2**self.bits)).all())
        if fits and torch.equal(-zeros * scales.float(), biases.float()):
            zeros = zeros.to(torch.uint8)
            return QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, False)
        index = torch.arange(width, dtype=torch.int32) // self.group_size
        return AffineWeight(codes, scales, None, biases, index.to(codes.device), self.bits)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        every = {**linears, **around}
        (usual, _), *_ = Counter(every.values()).most_common()
        others = {name: form._settings() for name, form in every.items() if form != usual}
        return {**usual._settings(), "mode": "affine", **others}

    def _settings(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits}

    @classmethod
    def _of(cls, settings: Mapping[str, Any]) -> Self:
        bits, size = settings.get("bits"), settings.get("group_size")
        if not isinstance(bits, int) or not isinstance(size, int):
            raise BadInput("The quantization section of this mlx model does not give bits and group_size.")
        return cls(bits, size)

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        if (mode := config.get("mode", "affine")) != "affine":
            raise BadInput(f"Checkpoints of mlx in the mode '{mode}' cannot be read; those in 'affine' can.")
        found = [(["Linear", "Embedding"], cls._of(config))]
        for name, value in config.items():
            if isinstance(value, Mapping) and "bits" in value:
                if value.get("mode", "affine") != "affine":
                    raise BadInput(
                        f"'{name}' is stored in the mode '{value['mode']}' of mlx, which cannot be read."
                    )
                found.append(([name], cls._of(value)))
        return found
