"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with ``settings`` of its own kind.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises many types for missing and broken tokenizer files
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"The model folder '{folder}' has no tokenizer that can be loaded ({reason})."
        ) from error
