"""Load the tokenizer of a model folder, and say in one sentence why it cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Code in the folder is never run.

    Args:
        folder: of the model.
        settings: passed on to the tokenizer's class, such as ``add_prefix_space``.

    Raises:
        BadInput: the folder has no tokenizer, or it cannot be read.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer

    from compress.engine.config import PRUNED_TYPE, UNLEARNED_TYPE

    try:
        kind = _model_type(folder)
        if kind.startswith(UNLEARNED_TYPE):
            plain = kind.removeprefix(UNLEARNED_TYPE).removeprefix(PRUNED_TYPE)
            settings["config"] = CONFIG_MAPPING[plain]()  # their files need not name the tokenizer
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises many types for missing and broken tokenizer files
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"The model folder '{folder}' has no tokenizer that can be loaded ({reason})."
        ) from error


def _model_type(folder: Path) -> str:
    """The model type in config.json; empty if there is none, for tokenizers that stand alone."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
