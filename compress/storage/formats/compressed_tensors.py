"""The format of the compressed-tensors library for integer codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, number_of_groups
from compress.kernels.codes.packing import pack, packed_width, unpack
from compress.storage.formats.base import Get, IntegerFormat, expect
from compress.storage.tensors import TensorInfo

DYNAMIC_TOKENS = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""How config.json declares inputs that are quantized with one scale per token, chosen anew at every call."""


class CompressedTensorsFormat(IntegerFormat):
    """``pack-quantized`` of the compressed-tensors library (llm-compressor, vLLM, transformers).

    The tensors of a linear are ``weight_packed`` int32 [out, ceil(in·b/32)], ``weight_scale`` [out, groups]
    in the dtype of the weight, ``weight_shape`` int64 [2], and if asymmetric ``weight_zero_point`` int32
    [ceil(out·b/32), groups].

    Args:
        bits, group_size, symmetric: as in `Format`.
        activation_bits: of the inputs, with one scale per token; None leaves them as they are.
    """

    name = "compressed-tensors"
    marker = "weight_packed"
    layout: ClassVar[str] = "pack-quantized"
    """The ``format`` in config.json."""

    def __init__(
        self, bits: int, group_size: int, symmetric: bool, activation_bits: int | None = None
    ) -> None:
        super().__init__(bits, group_size, symmetric)
        self.activation_bits = activation_bits

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        # Loaders keep scales in the dtype of the model, so another dtype would be rounded on loading.
        return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16) else torch.float32

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        self.check(weight)
        found = {
            f"{name}.weight_packed": pack(weight.codes, self.bits),
            f"{name}.weight_scale": weight.scales,
            f"{name}.weight_shape": torch.tensor(weight.shape),
        }
        if not self.symmetric:
            zeros = pack(weight.zeros.t(), self.bits).t().contiguous()
            found[f"{name}.weight_zero_point"] = zeros
        return found

    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        out, width = shape
        groups = number_of_groups(width, self.group_size, name)
        scale_dtype = weight_dtype if weight_dtype in ("F16", "BF16") else "F32"
        infos = {
            f"{name}.weight_packed": TensorInfo("I32", (out, packed_width(width, self.bits))),
            f"{name}.weight_scale": TensorInfo(scale_dtype, (out, groups)),
            f"{name}.weight_shape": TensorInfo("I64", (2,)),
        }
        if not self.symmetric:
            rows = packed_width(out, self.bits)
            infos[f"{name}.weight_zero_point"] = TensorInfo("I32", (rows, groups))
        return infos

    def read(self, name: str, get: Get) -> QuantizedWeight:
        out, width = get(f"{name}.weight_shape").tolist()
        packed, scales = get(f"{name}.weight_packed"), get(f"{name}.weight_scale")
        groups = number_of_groups(width, self.group_size, name)
        expect(f"{name}.weight_packed", packed, (out, packed_width(width, self.bits)))
        expect(f"{name}.weight_scale", scales, (out, groups))
        if self.symmetric:
            zeros = torch.full_like(scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            stored = get(f"{name}.weight_zero_point")
            expect(f"{name}.weight_zero_point", stored, (packed_width(out, self.bits), groups))
            zeros = unpack(stored.t(), self.bits, out).t().contiguous()
        codes = unpack(packed, self.bits, width).contiguous()
        return QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, self.symmetric)

    @classmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        # The most frequent format targets all linears. Those in another format are named in its group.
        forms = [form for form, _ in Counter(linears.values()).most_common()]
        targets: dict[Self, list[str]] = {form: [] for form in [*forms, *around.values()]}
        targets[forms[0]].append("Linear")
        for name, form in {**linears, **around}.items():
            if form != forms[0] or name in around:
                targets[form].append(name)
        groups = [form._group(names) for form, names in targets.items()]
        config: dict[str, Any] = {
            "quant_method": cls.name,
            "format": cls.layout,
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": [*outside, *skipped],
            "kv_cache_scheme": None,
        }
        if len(groups) == 1 and forms[0].activation_bits is None:
            # With this, weights are unpacked when they are loaded, else by a hook before the first call.
            # Without it, transformers 5.24 with compressed-tensors 0.20 refuses packed zero points, because
            # it expects their unpacked shape, and fails on packed embeddings; and sentence-transformers,
            # which calls `forward` past the hook, finds no weights. With it, everything is decoded by the
            # first group, so it must not be set if there are several.
            config["dequantize"] = True
        return config

    def _group(self, targets: list[str]) -> dict[str, Any]:
        channel = self.group_size == CHANNEL
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else self.group_size,
            "dynamic": False,
        }
        group: dict[str, Any] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        if self.activation_bits is not None:
            group["input_activations"] = {"num_bits": self.activation_bits, **DYNAMIC_TOKENS}
            # The format has to be repeated here, or the library packs no weight whose inputs are quantized.
            group["format"] = self.layout
        return group

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        groups = list((config.get("config_groups") or {}).values())
        if config.get("format") != cls.layout or not groups:
            raise BadInput(
                f"Compressed-tensors checkpoints in the format '{config.get('format')}' cannot be read; "
                "'pack-quantized', 'int-quantized', 'float-quantized' and the formats of FP4 can."
            )
        return [(list(group.get("targets") or []), cls._from_group(group)) for group in groups]

    @classmethod
    def _from_group(cls, group: Mapping[str, Any]) -> Self:
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise BadInput(f"Compressed-tensors weights of strategy '{strategy}' cannot be read.")
        if (order := weights.get("actorder")) in ("group", "dynamic"):
            raise BadInput(
                f"Compressed-tensors weights with the activation order '{order}', which shuffles the columns "
                "of groups, cannot be read."
            )
        inputs = group.get("input_activations")
        dynamic = not inputs or (
            all(inputs.get(key) == value for key, value in DYNAMIC_TOKENS.items())
            and inputs.get("num_bits") in range(2, 9)
        )
        if not dynamic or group.get("output_activations"):
            raise BadInput(
                "Compressed-tensors checkpoints with quantized activations can be read only if these are "
                "the inputs of linears: integers of 2 to 8 bits, symmetric, dynamic and per token."
            )
        size = CHANNEL if strategy == "channel" else weights["group_size"]
        symmetric = weights.get("symmetric", True)
        return cls(weights["num_bits"], size, symmetric, inputs["num_bits"] if inputs else None)
