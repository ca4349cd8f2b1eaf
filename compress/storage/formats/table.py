"""All formats, and which of them a config.json declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from compress.errors import BadInput
from compress.storage.formats.awq import AWQFormat
from compress.storage.formats.base import Format, IntegerFormat
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.floating import NAMES, FloatFormat
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.int_quantized import IntQuantizedFormat
from compress.storage.formats.llm_int8 import Int8Format
from compress.storage.formats.mlx import MLXFormat
from compress.storage.formats.nf4 import NF4Format
from compress.storage.formats.stacks import STACKS

FORMATS: dict[str, type[IntegerFormat]] = {form.name: form for form in (CompressedTensorsFormat, GPTQFormat)}
"""The formats of integer codes, which users choose among."""


class Formats:
    """The formats of a model's packed modules, which the ``quantization_config`` of its config.json declares.

    Attributes:
        marker: the tensor that every packed module has: ``{module}.{marker}``.
        groups: lists of targets, which `of` explains, and the format of each.
        bits: the bit widths that occur, in ascending order.

    Raises:
        BadInput: a quantization that cannot be read.
    """

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        try:
            kind = _kind_of(quantization_config)
            self.groups = kind.groups_of(quantization_config)
            self.bits = sorted({form.bits for _, form in self.groups})
            for targets, _ in self.groups:
                _check(targets)
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise BadInput(
                f"The quantization_config of this model is damaged ({type(error).__name__}: {error})."
            ) from None
        self.marker = kind.marker

    def of(self, name: str, kind: str = "Linear") -> Format:
        """The format of one module.

        A target is a full name, a regular expression after ``re:``, or a class. As in the compressed-tensors
        library, full names are tried first, then regular expressions, then classes.

        Args:
            name: full name of the module.
            kind: its class, ``Linear`` or ``Embedding``.

        Raises:
            BadInput: several formats are declared, but none for this module.
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


def _check(targets: list[str]) -> None:
    """Raise what is wrong with targets that `Formats.of` cannot compare with names."""
    for target in targets:
        if target.startswith("re:"):
            re.compile(target[3:])


def _refuse_rotations(transforms: Mapping[str, Any]) -> None:
    """Refuse (BadInput) a ``transform_config`` that asks for more than what is in the weights already."""
    places = {
        entry["location"]
        for scheme in (transforms.get("config_groups") or {}).values()
        for entry in scheme["apply"]
    }
    if online := sorted(places - {"weight_input", "weight_output"}):
        raise BadInput(
            "Compressed-tensors checkpoints that transform activations when they run (transform_config: "
            f"{', '.join(online)}) cannot be read."
        )


def _kind_of(quantization_config: Mapping[str, Any]) -> type[Format]:
    method = quantization_config.get("quant_method")
    if method == CompressedTensorsFormat.name:
        _refuse_rotations(quantization_config.get("transform_config") or {})
    if method == NF4Format.name:
        return Int8Format if quantization_config.get("load_in_8bit") else NF4Format
    if method == CompressedTensorsFormat.name and quantization_config.get("format") in NAMES:
        return FloatFormat
    if method == CompressedTensorsFormat.name and quantization_config.get("format") == "int-quantized":
        return IntQuantizedFormat
    if method == AWQFormat.name:
        return AWQFormat
    if method is None and {"bits", "group_size"} <= quantization_config.keys():  # mlx names no method
        return MLXFormat
    if method not in FORMATS:
        raise BadInput(
            f"This model is quantized with '{method}', which cannot be read; these can: "
            f"{', '.join([*FORMATS, AWQFormat.name, NF4Format.name, MLXFormat.name, *STACKS])}."
        )
    return FORMATS[method]


def format_of(quantization_config: Mapping[str, Any], name: str = "") -> Format:
    """The format of the linear ``name``; the name does not matter if all linears have the same format.

    Raises:
        BadInput: as `Formats` and `Formats.of`.
    """
    return Formats(quantization_config).of(name)
