"""compress-model: make language models smaller and prove what it cost.

Five functions do what the commands do:

- ``compress.run(recipe, output)`` carries out a recipe and writes a model folder;
- ``compress.load(folder)`` loads such a folder, or any plain Hugging Face folder, as a transformers model;
- ``compress.evaluate(model, baseline=...)`` measures a model beside the dense one;
- ``compress.audit(folder)`` finds out whether a model that was made to forget stays so;
- ``compress.compare(...)`` puts evaluated models into one table.

Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing takes a while to import, in which no interrupt is answered yet
if TYPE_CHECKING:
    from typing import Any

    from compress.engine.loading import load
    from compress.evaluation.evaluate import evaluate
    from compress.evaluation.forgetting.audit import audit
    from compress.evaluation.run import run
    from compress.report.table import compare

__version__ = "0.1.0"
__all__ = ["__version__", "audit", "compare", "evaluate", "load", "run"]

_MODULES = {
    "audit": "compress.evaluation.forgetting.audit",
    "compare": "compress.report.table",
    "evaluate": "compress.evaluation.evaluate",
    "load": "compress.engine.loading",
    "run": "compress.evaluation.run",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
