"""Text to token ids: in bounded pieces, and without a special token too many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 20  # characters given to a tokenizer at once: its bookkeeping takes many times the memory


def chunks(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> Iterator[list[int]]:
    """The tokens of ``text`` in order, ``size`` at a time; the last chunk may be shorter."""
    waiting: list[int] = []
    for piece in _pieces(text):
        waiting += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        whole = len(waiting) - len(waiting) % size
        for start in range(0, whole, size):
            yield waiting[start : start + size]
        del waiting[:whole]
    if waiting:
        yield waiting


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of at most ``PIECE`` characters, cut before the end of a line where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            line_end = text.rfind("\n", start + 1, end)
            end = line_end if line_end > 0 else end
        yield text[start:end]
        start = end


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS (or CLS) token, where this tokenizer begins texts with one."""
    begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return [token for token in tokenizer("a").input_ids[:1] if token in begins]


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        BadInput: the tokenizer has none.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise BadInput(
        "The tokenizer has no end-of-text token to put between short documents; "
        "give documents of at least seqlen tokens, or a smaller seqlen."
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary: the same for one tokenizer wherever its files lie."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
