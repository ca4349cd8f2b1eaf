"""Checkpoint formats of packed weights: names, layouts, config.json, and who can load them.

A format turns a `QuantizedWeight` into named tensors and back, bit for bit, and knows their dtypes and
shapes without data, so that a plan and a run cannot disagree.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from compress.checkpoint import TensorInfo
from compress.errors import BadInput
from compress.quantization.packing import (
    BITS,
    pack,
    pack_gptq_zeros,
    packed_width,
    unpack,
    unpack_gptq_zeros,
)
from compress.quantization.quantizer import CHANNEL, QuantizedWeight, number_of_groups

Get = Callable[[str], torch.Tensor]


class Format(ABC):
    """How quantized linears of one bit width, group size and symmetry are stored.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: values in a group along the input axis; −1: a whole row.
        symmetric: zero points are 2^(bits−1) and need not be stored.
    """

    name: ClassVar[str]
    marker: ClassVar[str]
    """The tensor that every linear stored in this format has: ``{linear}.{marker}``."""

    def __init__(self, bits: int, group_size: int, symmetric: bool) -> None:
        if bits not in BITS:
            raise BadInput(f"Weights of {bits} bits are not supported; there are 2, 3, 4 and 8.")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    @abstractmethod
    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored with, for a weight stored as ``weight_dtype``."""

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """What the checkpoint holds in place of ``{name}.weight``: full tensor names -> tensors."""

    @abstractmethod
    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        """The names, dtypes and shapes of `tensors`, for a linear of ``shape`` (out, in).

        Raises:
            BadInput: a linear of this shape cannot be stored.
        """

    @abstractmethod
    def read(self, name: str, get: Get) -> QuantizedWeight:
        """The inverse of `tensors`.

        Args:
            name: of the linear, such as ``model.layers.0.mlp.up_proj``.
            get: gives the tensor of a full name.

        Raises:
            BadInput: the tensors do not fit together, or use a feature that is not read here.
        """

    @abstractmethod
    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config`` entry of config.json.

        Args:
            quantized: full names of the linears stored in this format.
            skipped: linears inside the layers that stay as they are.
            outside: linears outside the layers (the head, input and output projections), which always do.
        """

    def check(self, weight: QuantizedWeight) -> None:
        """Raises ValueError for a weight of another kind than this format's: a programming error."""
        mine = (self.bits, self.group_size, self.symmetric)
        given = (weight.bits, weight.group_size, weight.symmetric)
        if mine != given:
            raise ValueError(
                f"A format of (bits, group size, symmetric) {mine} was given a weight of {given}."
            )


class CompressedTensors(Format):
    """``pack-quantized`` of the compressed-tensors library (llm-compressor, vLLM, transformers).

    ``weight_packed`` int32 [out, ceil(in·b/32)], ``weight_scale`` [out, groups] in the dtype of the weight,
    ``weight_shape`` int64 [2], and if asymmetric ``weight_zero_point`` int32 [ceil(out·b/32), groups].
    """

    name = "compressed-tensors"
    marker = "weight_packed"

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        # Loaders keep scales in the dtype of the model, so any other would be rounded on loading.
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
        _expect(f"{name}.weight_packed", packed, (out, packed_width(width, self.bits)))
        _expect(f"{name}.weight_scale", scales, (out, groups))
        if self.symmetric:
            zeros = torch.full((out, groups), 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            stored = get(f"{name}.weight_zero_point")
            _expect(f"{name}.weight_zero_point", stored, (packed_width(out, self.bits), groups))
            zeros = unpack(stored.t(), self.bits, out).t().contiguous()
        codes = unpack(packed, self.bits, width).contiguous()
        return QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, self.symmetric)

    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        channel = self.group_size == CHANNEL
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else self.group_size,
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [*outside, *skipped],
            "kv_cache_scheme": None,
        }
        if not self.symmetric:
            # Otherwise transformers 5.23 with compressed-tensors 0.20 expects zero points of the unpacked
            # shape and refuses these; the library itself, and vLLM, read the packed ones.
            config["dequantize"] = True
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        """The format that a ``quantization_config`` declares; BadInput if it is beyond what is read here."""
        groups = list((config.get("config_groups") or {}).values())
        if config.get("format") != "pack-quantized" or len(groups) != 1:
            raise BadInput(
                f"Of compressed-tensors checkpoints only 'pack-quantized' with one group of settings can be "
                f"read; this one is '{config.get('format')}' with {len(groups)}."
            )
        weights = groups[0].get("weights") or {}
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise BadInput(f"Compressed-tensors weights of strategy '{strategy}' cannot be read here.")
        if groups[0].get("input_activations") or groups[0].get("output_activations"):
            raise BadInput("Compressed-tensors checkpoints with quantized activations cannot be read here.")
        size = CHANNEL if strategy == "channel" else weights["group_size"]
        return cls(weights["num_bits"], size, weights.get("symmetric", True))


class GPTQ(Format):
    """The GPTQ layout (AutoGPTQ, GPTQModel, optimum): for 2, 3, 4 and 8 bits.

    ``qweight`` int32 [in·b/32, out], ``qzeros`` int32 [groups, out·b/32], ``scales`` float16 [groups, out],
    ``g_idx`` int32 [in]. Version 1 stores zero points minus one and is what every loader reads; it cannot
    hold a zero point of 0, so asymmetric weights are written as version 2 (``gptq_v2``).
    """

    name = "gptq"
    marker = "qweight"

    def __init__(self, bits: int, group_size: int, symmetric: bool, version: int | None = None) -> None:
        super().__init__(bits, group_size, symmetric)
        self.version = version or (1 if symmetric else 2)

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        self.check(weight)
        self._check_shape(name, weight.shape)
        return {
            f"{name}.qweight": pack(weight.codes, self.bits).t().contiguous(),
            f"{name}.qzeros": pack_gptq_zeros(weight.zeros, self.bits, self.version),
            f"{name}.scales": weight.scales.to(torch.float16).t().contiguous(),
            f"{name}.g_idx": self._group_index(weight.shape[1], name),
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

    def read(self, name: str, get: Get) -> QuantizedWeight:
        qweight, scales, qzeros = get(f"{name}.qweight"), get(f"{name}.scales"), get(f"{name}.qzeros")
        out, width = qweight.shape[1], qweight.shape[0] * 32 // self.bits
        groups = number_of_groups(width, self.group_size, name)
        _expect(f"{name}.scales", scales, (groups, out))
        _expect(f"{name}.qzeros", qzeros, (groups, packed_width(out, self.bits)))
        if not torch.equal(get(f"{name}.g_idx").to(torch.int32), self._group_index(width, name)):
            raise BadInput(f"'{name}' is stored in activation order (desc_act), which cannot be read here.")
        codes = unpack(qweight.t(), self.bits, width).contiguous()
        zeros = unpack_gptq_zeros(qzeros, self.bits, out, self.version)
        return QuantizedWeight(
            codes, scales.t().contiguous(), zeros, self.bits, self.group_size, self.symmetric
        )

    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
        }
        if skipped:
            # GPTQModel and vLLM read the first, optimum (transformers) the second: names by their ends.
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
            config["modules_in_block_to_quantize"] = [list(quantized)]
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQ:
        """The format that a ``quantization_config`` declares; BadInput if it is beyond what is read here."""
        layout = config.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise BadInput(f"GPTQ checkpoints in the layout '{layout}' cannot be read here.")
        return cls(
            config["bits"],
            config.get("group_size", 128),
            config.get("sym", True),
            version=1 if layout == "gptq" else 2,
        )

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


FORMATS: dict[str, type[CompressedTensors] | type[GPTQ]] = {
    CompressedTensors.name: CompressedTensors,
    GPTQ.name: GPTQ,
}


def format_of(quantization_config: Mapping[str, Any]) -> Format:
    """The format that the ``quantization_config`` of a config.json declares.

    Raises:
        BadInput: a quantization that cannot be read here.
    """
    method = quantization_config.get("quant_method")
    if method not in FORMATS:
        raise BadInput(
            f"This model is quantized with '{method}', which cannot be read here; there are: "
            f"{', '.join(FORMATS)}."
        )
    return FORMATS[method].from_config(quantization_config)


def loaders(quantization_config: Mapping[str, Any], conv1d: bool = False) -> str:
    """Who besides compress-model can load a model with this ``quantization_config``, for plans and cards.

    Tried with transformers 5.23, compressed-tensors 0.20, gptqmodel 7.6 and optimum 2.3. Nothing is said
    about programs that were not tried.

    Args:
        quantization_config: of config.json.
        conv1d: whether the quantized linears are ``Conv1D`` modules in transformers (GPT-2), which neither
            loader of transformers replaces by packed ones.
    """
    form = format_of(quantization_config)
    if isinstance(form, CompressedTensors):
        return "compress-model only" if conv1d else "transformers with compressed-tensors"
    if conv1d:
        return "gptqmodel"
    # GPTQModel's 4-bit kernel for CPUs takes groups of 32 to 256 only.
    where = " on a GPU" if form.bits == 4 and form.group_size not in (32, 64, 128, 256) else ""
    return f"transformers with optimum and gptqmodel{where}"


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadInput(f"The tensor '{name}' has shape {tuple(tensor.shape)} where {shape} was expected.")
