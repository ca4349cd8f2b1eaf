"""How floating-point weights are stored: as the compressed-tensors library does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
"""What config.json calls the formats -> their numbers."""

# llm-compressor's schemes FP8_DYNAMIC, MXFP4A16 and NVFP4A16.
WEIGHTS: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "strategy": "channel", "group_size": None},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
"""FP8 of activations, each token under its own scale."""


class FloatFormat(Format):
    """``float-quantized``, ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``.

    - ``fp8``: ``weight`` float8_e4m3fn [out, in] and ``weight_scale`` [out, 1] in the dtype of the weight;
      the inputs of the linear are rounded to FP8, too, when it runs.
    - ``mxfp4``: ``weight_packed`` uint8 [out, in / 2], the first code of two in the low half, and
      ``weight_scale`` uint8 [out, in / 32].
    - ``nvfp4``: the same with ``weight_scale`` float8_e4m3fn [out, in / 16], and ``weight_global_scale``
      float32 [1].
    """

    name = "compressed-tensors"
    marker = "weight_scale"

    def __init__(self, type: FloatType) -> None:
        super().__init__(WEIGHTS[type]["num_bits"], GROUP_SIZES[type], symmetric=True)
        self.type = type

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
        scales, whole = get(f"{name}.weight_scale"), None
        codes = get(f"{name}.{'weight' if self.type == 'fp8' else 'weight_packed'}")
        if self.type != "fp8":
            codes = unpack_nibbles(codes)
        if self.type == "nvfp4":
            whole = get(f"{name}.weight_global_scale")
            expect(f"{name}.weight_global_scale", whole, (1,))
        out, width = codes.shape
        expect(f"{name}.weight_scale", scales, (out, number_of_groups(width, self.group_size, name)))
        wanted = {"fp8": torch.is_floating_point(scales), "mxfp4": scales.dtype == torch.uint8}
        if not wanted.get(self.type, scales.dtype == E4M3):
            raise BadInput(f"The tensor '{name}.weight_scale' is {scales.dtype}, which {self.type} has not.")
        return FloatWeight(self.type, codes, scales, whole)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, FloatFormat],
        around: Mapping[str, FloatFormat],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        form, *others = dict.fromkeys(linears.values())
        if others or around:
            raise BadInput("Floating formats are written with one kind of numbers, and for linears only.")
        group = {
            "targets": ["Linear"],
            "weights": {**WEIGHTS[form.type], "type": "float", "symmetric": True, "dynamic": False},
            "input_activations": TOKENS if form.type == "fp8" else None,
            "output_activations": None,
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": next(name for name, type in NAMES.items() if type == form.type),
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [*outside, *skipped],
            "kv_cache_scheme": None,
        }
        if form.type != "fp8":
            # Otherwise compressed-tensors 0.20 unpacks them to bfloat16 whatever the dtype of the model, in
            # the first forward pass; they are not kept packed on a CPU in either case.
            config["dequantize"] = True
        return config

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Format]]:
        form = cls(NAMES[config["format"]])
        groups = list((config.get("config_groups") or {}).values())
        if not groups:
            raise BadInput(f"This '{config['format']}' checkpoint does not say which linears it has packed.")
        for group in groups:
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            expected = WEIGHTS[form.type] | {"type": "float"}
            if any(weights.get(key) != value for key, value in expected.items() if key != "scale_dtype"):
                raise BadInput(
                    f"Of '{config['format']}' only weights of strategy '{expected['strategy']}' can be read."
                )
            same = inputs is not None and all(inputs.get(key) == value for key, value in TOKENS.items())
            if not (same if form.type == "fp8" else inputs is None) or group.get("output_activations"):
                raise BadInput(
                    f"Of '{config['format']}' only checkpoints with "
                    f"{'FP8 activations, a scale a token,' if form.type == 'fp8' else 'dense activations'} "
                    "can be read."
                )
        return [(list(group.get("targets") or []), form) for group in groups]
