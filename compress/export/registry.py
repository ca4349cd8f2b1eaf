"""All formats that a model can be exported to, by name. They are imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from compress.errors import unknown

if TYPE_CHECKING:
    from compress.export.base import Target

TARGETS = {
    "gguf": "compress.export.gguf:GGUF",
    "huggingface": "compress.export.huggingface:HuggingFace",
}
"""Name -> "module:Class"."""


def find_target(name: str) -> Target:
    """The target (an instance) of that name.

    Raises:
        BadInput: there is none.
    """
    if name not in TARGETS:
        raise unknown("format", name, TARGETS)
    module, _, attribute = TARGETS[name].partition(":")
    return getattr(import_module(module), attribute)()
