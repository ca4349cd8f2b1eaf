"""All formats, and which one a config.json declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from compress.errors import BadInput
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import CompressedTensors
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.stacks import STACKS

FORMATS: dict[str, type[CompressedTensors] | type[GPTQFormat]] = {
    CompressedTensors.name: CompressedTensors,
    GPTQFormat.name: GPTQFormat,
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
