"""The formats of the compressed-tensors library for floating-point codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.floating import (
    E4M3,
    GROUP_SIZES,
    FloatType,
    FloatWeight,
    pack_nibbles,
    unpack_nibbles,
)
from compress.kernels.codes.integer import number_of_groups
from compress.storage.formats.base import Format, Get, expect
from compress.storage.tensors import TensorInfo

NAMES: dict[str, FloatType] = {
    "float-quantized": "fp8",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}
"""The name of a format in config.json -> the floating-point type it stores."""

SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "strategy": "channel", "group_size": None},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
"""How config.json declares the weights: the schemes FP8_DYNAMIC, MXFP4A16 and NVFP4A16 of llm-compressor."""

FP8_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
"""How config.json declares inputs in FP8 with one scale per token."""


class FloatFormat(Format[FloatWeight]):
    """``float-quantized``, ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``.

    The tensors of a linear are:

    - ``fp8``: ``weight`` float8_e4m3fn [out, in] and ``weight_scale`` [out, 1] in the dtype of the weight.
      When the linear runs, its inputs are rounded to FP8 as well.
    - ``mxfp4``: ``weight_packed`` uint8 [out, in / 2], the first code of two in the low half, and
      ``weight_scale`` uint8 [out, in / 32].
    - ``nvfp4``: the same, but with ``weight_scale`` float8_e4m3fn [out, in / 16], and ``weight_global_scale``
      float32 [1].
    """

    name = "compressed-tensors"
    marker = "weight_scale"

    def __init__(self, type: FloatType) -> None:
        super().__init__(SCHEMES[type]["num_bits"], GROUP_SIZES[type], symmetric=True)
        self.type = type

    @property
    def rounds_inputs(self) -> bool:
        return self.type == "fp8"

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16) else torch.float32

    def tensors(self, name: str, weight: FloatWeight) -> dict[str, torch.Tensor]:
        if weight.type != self.type:
            raise ValueError(f"A format of {self.type} was given a weight of {weight.type}.")
        found = {f"{name}.weight_scale": weight.scales}
        if self.type == "fp8":
            return found | {f"{name}.weight": weight.codes}
        found[f"{name}.weight_packed"] = pack_nibbles(weight.codes)
        if weight.global_scale is not None:
            found[f"{name}.weight_global_scale"] = weight.global_scale
        return found

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        out, width = shape
        scales = (out, number_of_groups(width, self.group_size, name))
        if self.type == "fp8":
            scale_dtype = weight_dtype if weight_dtype in ("F16", "BF16") else "F32"
            return {
                f"{name}.weight_scale": TensorInfo(scale_dtype, scales),
                f"{name}.weight": TensorInfo("F8_E4M3", shape),
            }
        infos = {
            f"{name}.weight_scale": TensorInfo("U8" if self.type == "mxfp4" else "F8_E4M3", scales),
            f"{name}.weight_packed": TensorInfo("U8", (out, width // 2)),
        }
        if self.type == "nvfp4":
            infos[f"{name}.weight_global_scale"] = TensorInfo("F32", (1,))
        return infos

    def read(self, name: str, get: Get) -> FloatWeight:
        scales, global_scale = get(f"{name}.weight_scale"), None
        codes = get(f"{name}.{'weight' if self.type == 'fp8' else 'weight_packed'}")
        if self.type != "fp8":
            codes = unpack_nibbles(codes)
        if self.type == "nvfp4":
            global_scale = get(f"{name}.weight_global_scale")
            expect(f"{name}.weight_global_scale", global_scale, (1,))
        out, width = codes.shape
        expect(f"{name}.weight_scale", scales, (out, number_of_groups(width, self.group_size, name)))
        wanted = {"fp8": torch.is_floating_point(scales), "mxfp4": scales.dtype == torch.uint8}
        if not wanted.get(self.type, scales.dtype == E4M3):
            raise BadInput(
                f"The tensor '{name}.weight_scale' is {scales.dtype}, which does not fit {self.type}."
            )
        return FloatWeight(self.type, codes, scales, global_scale)

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
            raise BadInput(
                "Floating-point formats store linears inside the layers only, all with the same type."
            )
        group = {
            "targets": ["Linear"],
            "weights": {**SCHEMES[form.type], "type": "float", "symmetric": True, "dynamic": False},
            "input_activations": FP8_TOKENS if form.type == "fp8" else None,
            "output_activations": None,
        }
        config: dict[str, Any] = {
            "quant_method": cls.name,
            "format": next(name for name, type in NAMES.items() if type == form.type),
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [*outside, *skipped],
            "kv_cache_scheme": None,
        }
        if form.type != "fp8":
            # Without this, compressed-tensors 0.20 unpacks them to bfloat16 in the first forward pass,
            # whatever the dtype of the model. On a CPU they do not stay packed in either case.
            config["dequantize"] = True
        return config

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        form = cls(NAMES[config["format"]])
        groups = list((config.get("config_groups") or {}).values())
        if not groups:
            raise BadInput(f"This '{config['format']}' checkpoint does not say which linears are packed.")
        for group in groups:
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            expected = SCHEMES[form.type] | {"type": "float"}
            if any(weights.get(key) != value for key, value in expected.items() if key != "scale_dtype"):
                raise BadInput(
                    f"'{config['format']}' checkpoints can be read only if the strategy of their weights is "
                    f"'{expected['strategy']}'."
                )
            same = inputs is not None and all(inputs.get(key) == value for key, value in FP8_TOKENS.items())
            if not (same if form.type == "fp8" else inputs is None) or group.get("output_activations"):
                raise BadInput(
                    f"'{config['format']}' checkpoints can be read only if their activations are "
                    f"{'in FP8 with one scale per token' if form.type == 'fp8' else 'not quantized'}."
                )
        return [(list(group.get("targets") or []), form) for group in groups]
