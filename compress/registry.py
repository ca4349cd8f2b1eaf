"""All methods by name. They are imported when asked for, never at start-up."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from compress.errors import CompressError, unknown

# family -> name -> "module:Class". Third parties add theirs through the entry-point group
# ``compress_model.methods`` (name = "module:Class"); their family is the one the class declares.
METHODS: dict[str, dict[str, str]] = {
    "unlearning": {},
    "pruning": {
        "replaceme": "compress.pruning.replaceme:ReplaceMe",
    },
    "quantization": {
        "rtn": "compress.quantization.round_to_nearest:RoundToNearest",
    },
}
GROUP = "compress_model.methods"


@cache
def method_names() -> dict[str, str]:
    """Name -> "module:Class" of every method, ours and third parties'."""
    ours = {name: path for family in METHODS.values() for name, path in family.items()}
    return {point.name: point.value for point in entry_points(group=GROUP)} | ours


def find_method(name: str, family: str | None = None) -> Any:
    """The method (an instance) of that name.

    Raises:
        BadInput: there is none, or it belongs to another family than ``family``.
        CompressError: a third party's method cannot be imported.
    """
    names = method_names()
    if name not in names:
        raise unknown("method", name, names if family is None else METHODS[family])
    module, _, attribute = names[name].partition(":")
    try:
        method = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise CompressError(f"The method '{name}' cannot be imported from {names[name]}: {error}.") from error
    if family is not None and method.family != family:
        raise unknown(f"{family} method", name, METHODS[family])
    return method
