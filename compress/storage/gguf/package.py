"""The gguf package, which is an extra."""

from __future__ import annotations

from typing import Any

from compress.errors import BadInput


def gguf_package() -> Any:
    """The module ``gguf``.

    Raises:
        BadInput: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise BadInput(
            "GGUF files need the package gguf; run `pip install 'compress-model[gguf]'`."
        ) from None
    return gguf
