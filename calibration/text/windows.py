"""Windows of tokens: what calibration statistics are taken on and what perplexity is measured on.

How documents become windows of ``seqlen`` tokens for calibration:

- a document at least one window long is cut from its beginning into whole windows; what is left at its end is
  not used, so such a window never holds anything of another document;
- shorter documents are packed: written one after the other, each followed by the tokenizer's end-of-text
  token, and this stream is cut into whole windows (as models are pretrained). A packed window may begin
  inside a document; attention is not cut at the end-of-text tokens;
- a tokenizer that begins texts with a BOS token gets exactly one, at the beginning of each window; no other
  special tokens are added.

This is for decoders; encoders read one example an input (see the module ``encoder_inputs``).

For evaluation every document is cut on its own into windows that do not overlap, and the last, shorter one of
each is padded, so that every token counts once. The first token of a window has no prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.text.sources import Documents, read_documents
from compress.calibration.text.tokens import chunks, fingerprint, first_tokens, separator
from compress.engine.windows import Windows
from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

POOL = 8  # windows are taken out of this many times as many, so that a few long documents do not fill them


def overlap(calibration: Windows, evaluation: Windows) -> frozenset[str]:
    """The hashes of the documents both have tokens of; not empty means the evaluation is not to be trusted.

    Documents are compared whole, white space apart: the same text cut up differently is not noticed.
    """
    return calibration.document_hashes & evaluation.document_hashes


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Documents,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool = False,
) -> Windows:
    """``nsamples`` windows of ``seqlen`` tokens, drawn at random from the documents of ``source``.

    Documents are shuffled by ``seed`` and cut or packed (see above) until there are eight times the windows
    asked for; ``nsamples`` of those are drawn. With ``chat_template`` each row is instead one conversation,
    rendered by the tokenizer's template, cut at ``seqlen`` and padded on the right; a plain document becomes
    a conversation of one user message.

    Where the text is not enough, there are fewer windows and a warning says how many.

    Raises:
        BadInput: the source is no good, holds less than one window, or has conversations but no chat template
            was asked for; the tokenizer lacks a chat template.
        CompressError: the source cannot be fetched.
    """
    _check(1, nsamples=nsamples)
    _check(2, seqlen=seqlen)
    documents = _documents(source, POOL * nsamples * seqlen)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents.entries), generator=generator).tolist()
    if chat_template:
        rows = _first(nsamples, _conversations(tokenizer, documents, order, seqlen))
    else:
        pool = _first(POOL * nsamples, _cut_or_packed(tokenizer, documents, order, seqlen))
        rows = [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()[:nsamples]]
    if not rows:
        raise BadInput(
            f"{documents.source} holds less than one window of {seqlen} tokens; "
            "give more text or a smaller seqlen."
        )
    if len(rows) < nsamples:
        log.warning(
            "%s holds only %d of the %d windows of %d tokens asked for; calibrating on those.",
            documents.source,
            len(rows),
            nsamples,
            seqlen,
        )
    settings = {"nsamples": nsamples, "seed": seed, "chat_template": chat_template}
    return _windows(tokenizer, documents, rows, seqlen, settings)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, source: str | Documents, context: int, limit: int | None = None
) -> Windows:
    """Windows of ``context`` tokens of ``source``, document by document: all, or ``limit`` of them.

    Windows do not overlap (the stride is the context) and each begins a fresh context, so its first token is
    not predicted. Nothing here is random: a limit takes windows at even distances out of the first eight
    times as many, so that they do not all come from one long document.

    Raises:
        BadInput: the source is no good or holds conversations.
        CompressError: the source cannot be fetched.
    """
    _check(1, limit=1 if limit is None else limit)
    _check(2, context=context)
    documents = _documents(source, None if limit is None else POOL * limit * context)
    rows = _first(None if limit is None else POOL * limit, _every_token(tokenizer, documents, context))
    if limit is not None and len(rows) > limit:
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    if not rows:
        raise BadInput(f"{documents.source} holds no text to predict; give documents of two tokens and more.")
    return _windows(tokenizer, documents, rows, context, {"limit": limit, "stride": context})


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    documents: frozenset[int]


def _cut_or_packed(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, order: list[int], seqlen: int
) -> Iterator[_Row]:
    first = first_tokens(tokenizer)
    room = seqlen - len(first)
    packed: list[int] = []
    owners: list[int] = []  # the document of each packed token
    for index in order:
        for number, chunk in enumerate(chunks(tokenizer, _text(documents, index), room)):
            if len(chunk) == room:
                yield _Row(first + chunk, frozenset([index]))
            elif number == 0:
                packed += [*chunk, separator(tokenizer)]
                owners += [index] * (len(chunk) + 1)
        while len(packed) >= room:
            yield _Row(first + packed[:room], frozenset(owners[:room]))
            del packed[:room], owners[:room]


def _every_token(tokenizer: PreTrainedTokenizerBase, documents: Documents, context: int) -> Iterator[_Row]:
    first = first_tokens(tokenizer)
    for index in range(len(documents.entries)):
        for chunk in chunks(tokenizer, _text(documents, index), context - len(first)):
            if len(first + chunk) > 1:  # a single token predicts nothing
                yield _Row(first + chunk, frozenset([index]))


def _conversations(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, order: list[int], seqlen: int
) -> Iterator[_Row]:
    if not tokenizer.chat_template:
        raise BadInput(
            "The tokenizer has no chat template; calibrate without it or add one to the model folder."
        )
    for index in order:
        entry = documents.entries[index]
        messages = [{"role": "user", "content": entry}] if isinstance(entry, str) else list(entry)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # the template is a program of the model's, it may fail in any way
            raise BadInput(
                f"The model's chat template refuses conversation {index + 1} of {documents.source} ({error})."
            ) from error
        # The template writes BOS and all other special tokens itself.
        tokens = tokenizer(text, add_special_tokens=False, truncation=True, max_length=seqlen).input_ids
        yield _Row(tokens, frozenset([index]))


def _text(documents: Documents, index: int) -> str:
    entry = documents.entries[index]
    if not isinstance(entry, str):
        raise BadInput(
            f"{documents.source} holds conversations; they are calibration text with a chat template only."
        )
    return entry


def _documents(source: str | Documents, tokens: int | None) -> Documents:
    """The documents of ``source``; of an endless one about ``tokens``, at a generous 8 characters each."""
    if isinstance(source, Documents):
        return source
    return read_documents(source, None if tokens is None else 8 * tokens)


def _first(count: int | None, rows: Iterator[_Row]) -> list[_Row]:
    return list(islice(rows, count))


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    rows: list[_Row],
    length: int,
    settings: dict[str, Any],
) -> Windows:
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    tokens = torch.full((len(rows), length), padding, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = True
    used = frozenset().union(*(row.documents for row in rows))
    about = {
        "licence": documents.licence,
        "text_sha256": documents.sha256,
        "tokenizer": fingerprint(tokenizer),
    }
    return Windows(
        tokens, mask, documents.source, frozenset(documents.hashes[index] for index in used), settings | about
    )


def _check(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise BadInput(f"{name} is {value}; it must be {least} or more.")
