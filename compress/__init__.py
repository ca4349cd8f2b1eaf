"""compress-model: make language models smaller and prove what it cost.

``compress.load(folder)`` gives back any model folder this package wrote (or any plain Hugging Face
folder) as an ordinary ``transformers`` model. Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.engine.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from compress.engine.loading import load

        return load
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
