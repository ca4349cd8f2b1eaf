"""Text to token ids: in pieces that bound memory, and with exactly the special tokens that are wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 20  # characters given to a tokenizer in one call, which needs many times their memory


def chunks(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> Iterator[list[int]]:
    """Yield the tokens of ``text`` in chunks of ``size``, without special tokens; the last may be shorter."""
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
    """The BOS (or CLS) token as a list, which is empty if this tokenizer does not begin texts with one."""
    begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return [token for token in tokenizer("a").input_ids[:1] if token in begins]


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        BadInput: the tokenizer has no such token.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise BadInput(
        "The tokenizer has no end-of-text token to put between short documents; "
        "give documents of at least seqlen tokens, or use a smaller seqlen."
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the vocabulary. It does not depend on where the files of the tokenizer are."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
