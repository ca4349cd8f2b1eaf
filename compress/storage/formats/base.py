"""Checkpoint formats of packed weights: names, layouts, config.json, and who can load them.

A format turns a `QuantizedWeight` into named tensors and back, bit for bit, and knows their dtypes and
shapes without data, so that a plan and a run cannot disagree.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, number_of_groups
from compress.kernels.codes.packing import (
    BITS,
    pack,
    pack_gptq_zeros,
    packed_width,
    unpack,
    unpack_gptq_zeros,
)
from compress.storage.checkpoint import TensorInfo
from compress.storage.formats.stacks import STACKS

Get = Callable[[str], torch.Tensor]

DYNAMIC_TOKENS = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""What compressed-tensors calls inputs that are quantized with one scale a token, made anew at every call."""


class Format(ABC):
    """How quantized linears of one bit width, group size and symmetry are stored.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: values in a group along the input axis; −1: a whole row.
        symmetric: zero points are 2^(bits−1) and need not be stored.
    """

    activation_bits: int | None = None
    """Of the inputs of linears, which are then quantized per token; None leaves them as they are."""

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

    @classmethod
    @abstractmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The ``quantization_config`` entry of config.json.

        Args:
            linears: full name -> format of the packed linears inside the layers.
            around: the same of the head and the token embedding.
            skipped: linears inside the layers that stay as they are.
            outside: linears outside the layers (the head, input and output projections) that do.

        Raises:
            BadInput: this format cannot hold such a mixture.
        """

    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`describe`, where all linears ``quantized`` are stored in this format."""
        return self.describe(dict.fromkeys(quantized, self), {}, skipped, outside)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    @classmethod
    @abstractmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Format]]:
        """What a ``quantization_config`` of this kind declares: targets (see `Formats.of`) and their format.

        Raises:
            BadInput: it uses a feature that is not read here.
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

    def __init__(
        self, bits: int, group_size: int, symmetric: bool, activation_bits: int | None = None
    ) -> None:
        super().__init__(bits, group_size, symmetric)
        self.activation_bits = activation_bits

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
        expect(f"{name}.weight_packed", packed, (out, packed_width(width, self.bits)))
        expect(f"{name}.weight_scale", scales, (out, groups))
        if self.symmetric:
            zeros = torch.full((out, groups), 2 ** (self.bits - 1), dtype=torch.uint8)
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
        # The most frequent format is everybody's who is not named in another group or ignored.
        forms = [form for form, _ in Counter(linears.values()).most_common()]
        targets: dict[Self, list[str]] = {form: [] for form in [*forms, *around.values()]}
        targets[forms[0]].append("Linear")
        for name, form in {**linears, **around}.items():
            if form != forms[0] or name in around:
                targets[form].append(name)
        groups = [form._group(names) for form, names in targets.items()]
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": [*outside, *skipped],
            "kv_cache_scheme": None,
        }
        if len(groups) == 1 and (around or not forms[0].symmetric):
            # Otherwise transformers 5.24 with compressed-tensors 0.20 expects zero points of the unpacked
            # shape and refuses these, and trips over packed embeddings. It then decodes everything by the
            # first group, so this must not be set where there are several.
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
        group = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        if self.activation_bits is not None:
            group["input_activations"] = {"num_bits": self.activation_bits, **DYNAMIC_TOKENS}
            # Once more here: unless told, the library packs no weight whose inputs are quantized.
            group["format"] = "pack-quantized"
        return group

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], CompressedTensors]]:
        groups = list((config.get("config_groups") or {}).values())
        if config.get("format") != "pack-quantized" or not groups:
            raise BadInput(
                f"Of compressed-tensors checkpoints only 'pack-quantized' can be read; this one is "
                f"'{config.get('format')}'."
            )
        return [(list(group.get("targets") or []), cls._from_group(group)) for group in groups]

    @classmethod
    def _from_group(cls, group: Mapping[str, Any]) -> CompressedTensors:
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise BadInput(f"Compressed-tensors weights of strategy '{strategy}' cannot be read here.")
        inputs = group.get("input_activations")
        dynamic = not inputs or (
            all(inputs.get(key) == value for key, value in DYNAMIC_TOKENS.items())
            and inputs.get("num_bits") in range(2, 9)
        )
        if not dynamic or group.get("output_activations"):
            raise BadInput(
                "Of compressed-tensors checkpoints with quantized activations only those can be read here "
                "whose inputs are whole numbers of 2 to 8 bits, symmetric, dynamic, per token."
            )
        size = CHANNEL if strategy == "channel" else weights["group_size"]
        symmetric = weights.get("symmetric", True)
        return cls(weights["num_bits"], size, symmetric, inputs["num_bits"] if inputs else None)


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
        expect(f"{name}.scales", scales, (groups, out))
        expect(f"{name}.qzeros", qzeros, (groups, packed_width(out, self.bits)))
        if not torch.equal(get(f"{name}.g_idx").to(torch.int32), self._group_index(width, name)):
            raise BadInput(f"'{name}' is stored in activation order (desc_act), which cannot be read here.")
        codes = unpack(qweight.t(), self.bits, width).contiguous()
        zeros = unpack_gptq_zeros(qzeros, self.bits, out, self.version)
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
            what = "several bit widths" if others else "a packed head or embedding"
            raise BadInput(f"The format gptq is not written with {what}; use the format compressed-tensors.")
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": form.bits,
            "group_size": form.group_size,
            "sym": form.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if form.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
        }
        if skipped:
            # GPTQModel and vLLM read the first, optimum (transformers) the second: names by their ends.
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
            config["modules_in_block_to_quantize"] = [list(linears)]
        return config

    @classmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], GPTQ]]:
        layout = config.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise BadInput(f"GPTQ checkpoints in the layout '{layout}' cannot be read here.")
        if any(not pattern.startswith("-:") for pattern in config.get("dynamic") or {}):
            raise BadInput("GPTQ checkpoints of several bit widths cannot be read here.")
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


FORMATS: dict[str, type[CompressedTensors] | type[GPTQ]] = {
    CompressedTensors.name: CompressedTensors,
    GPTQ.name: GPTQ,
}


class Formats:
    """The formats of a model's packed modules, as the ``quantization_config`` of its config.json declares.

    Attributes:
        marker: the tensor that every packed module has: ``{module}.{marker}``.
        groups: targets and their format, see `of`.
        bits: the bit widths there are, in ascending order.

    Raises:
        BadInput: a quantization that cannot be read here.
    """

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        kind = _kind_of(quantization_config)
        self.groups = kind.groups_of(quantization_config)
        self.marker = kind.marker
        self.bits = sorted({form.bits for _, form in self.groups})

    def of(self, name: str, kind: str = "Linear") -> Format:
        """The format of one module, by its full name and its class (``Linear`` or ``Embedding``).

        Full names go before regular expressions after ``re:``, and these before classes, as in the
        compressed-tensors library.

        Raises:
            BadInput: several formats are declared, and none for this module.
        """
        if len(self.groups) == 1:
            return self.groups[0][1]
        order = sorted(
            ((target, form) for targets, form in self.groups for target in targets),
            key=lambda item: item[0],
        )
        rules: tuple[Callable[[str], Any], ...] = (
            lambda target: target == name,
            lambda target: target.startswith("re:") and re.match(target[3:], name),
            lambda target: target == kind,
        )
        for rule in rules:
            for target, form in order:
                if rule(target):
                    return form
        raise BadInput(f"The model's quantization_config does not say how '{name}' is packed.")


def _kind_of(quantization_config: Mapping[str, Any]) -> type[Format]:
    from compress.storage.formats.floating import NAMES, FloatFormat
    from compress.storage.formats.llm_int8 import Int8Format
    from compress.storage.formats.nf4 import NF4Format

    method = quantization_config.get("quant_method")
    if method == NF4Format.name:
        return Int8Format if quantization_config.get("load_in_8bit") else NF4Format
    if method == CompressedTensors.name and quantization_config.get("format") in NAMES:
        return FloatFormat
    if method not in FORMATS:
        raise BadInput(
            f"This model is quantized with '{method}', which cannot be read here; there are: "
            f"{', '.join([*FORMATS, NF4Format.name, *STACKS])}."
        )
    return FORMATS[method]


def format_of(quantization_config: Mapping[str, Any], name: str = "") -> Format:
    """The format of the linear ``name``, or of any where all have the same; raises BadInput as `Formats`."""
    return Formats(quantization_config).of(name)


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises BadInput if a stored tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise BadInput(f"The tensor '{name}' has shape {tuple(tensor.shape)} where {shape} was expected.")
