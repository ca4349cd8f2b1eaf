"""Cut documents into windows of tokens for decoders, for calibration and for measuring perplexity.

For calibration, documents become windows of ``seqlen`` tokens like this:

- A document of at least one window is cut from its beginning into whole windows. The rest at its end is not
  used, so such a window holds tokens of one document only.
- Shorter documents are packed: they are written one after the other, each followed by the tokenizer's
  end-of-text token, and this stream is cut into whole windows, as in pretraining. A packed window may begin
  inside a document, and attention crosses the end-of-text tokens.
- If the tokenizer begins texts with a BOS token, each window begins with exactly one. No other special tokens
  are added.
- A document that the source holds several times is used once. Methods hold out some of the windows, and a
  copy of what they were fitted to is no test.

For evaluation, every document is cut into windows that do not overlap, and its last, shorter one is padded,
so that every token counts once. The first token of a window is not predicted.

Encoders get one example per input instead (see the module ``encoder_inputs``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.text.records import Records, without
from compress.calibration.text.sources import Documents, read_documents
from compress.calibration.text.tokens import chunks, fingerprint, first_tokens, separator
from compress.engine.windows import Windows
from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

POOL = 8  # windows are chosen from this many times as many, so that a few long documents do not fill all


def overlap(calibration: Windows, evaluation: Windows) -> frozenset[str]:
    """The hashes of the documents that both have tokens of; if there are any, do not trust the evaluation.

    Whole documents are compared, without regard to white space. So the same text is not noticed if it is
    divided into other documents.
    """
    return calibration.document_hashes & evaluation.document_hashes


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Documents,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool = False,
    forget: Sequence[Records] = (),
) -> Windows:
    """Windows drawn at random from the documents of ``source``.

    Documents are shuffled and cut or packed (see above) until there are eight times as many windows as asked
    for, of which ``nsamples`` are drawn. If the text is not enough, there are fewer windows, and a warning
    says how many.

    Args:
        tokenizer: of the model.
        source: the string that names it, or its documents.
        nsamples: number of windows.
        seqlen: tokens in each window.
        seed: of the order of the documents and of the draw.
        chat_template: make each window one conversation instead, rendered with the tokenizer's template, cut
            at ``seqlen`` and padded on the right. A plain document becomes one user message.
        forget: what the model has forgotten; documents that tell it are left out.

    Raises:
        BadInput: the source cannot be used or holds less than one window; it has conversations but no chat
            template was asked for; the tokenizer lacks a chat template.
        CompressError: the source cannot be fetched.
    """
    _check(1, nsamples=nsamples)
    _check(2, seqlen=seqlen)
    documents = _documents(source, POOL * nsamples * seqlen)
    if forget:
        documents = without(documents, forget)
    generator = torch.Generator().manual_seed(seed)
    distinct = documents.distinct
    order = [distinct[i] for i in torch.randperm(len(distinct), generator=generator).tolist()]
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
            "%s holds only %d of the %d windows of %d tokens asked for; calibration uses these.",
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
    """Windows for evaluation, document by document.

    Windows do not overlap (the stride is the context), and each begins a fresh context, so its first token is
    not predicted. Nothing here is random.

    Args:
        tokenizer: of the model.
        source: the string that names it, or its documents.
        context: tokens in each window.
        limit: the largest number of windows. They are taken at even distances from the first eight times as
            many, so that they do not all come from one long document. None takes all windows.

    Raises:
        BadInput: the source cannot be used or holds conversations.
        CompressError: the source cannot be fetched.
    """
    _check(1, windows=1 if limit is None else limit)
    _check(2, context=context)
    documents = _documents(source, None if limit is None else POOL * limit * context)
    rows = _first(None if limit is None else POOL * limit, _every_token(tokenizer, documents, context))
    if limit is not None and len(rows) > limit:
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    if not rows:
        raise BadInput(f"{documents.source} holds no text to predict; give documents of two or more tokens.")
    return _windows(tokenizer, documents, rows, context, {"limit": limit, "stride": context})


@dataclass(frozen=True)
class _Row:
    """The tokens of a window, without padding, and the indices of the documents they come from."""

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
            "The tokenizer has no chat template; calibrate without one, or add one to the model folder."
        )
    for index in order:
        entry = documents.entries[index]
        messages = [{"role": "user", "content": entry}] if isinstance(entry, str) else list(entry)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program, and may raise anything
            raise BadInput(
                f"The model's chat template refuses conversation {index + 1} of {documents.source} ({error})."
            ) from error
        # The template writes BOS and all other special tokens itself.
        tokens = tokenizer(text, add_special_tokens=False, truncation=True, max_length=seqlen).input_ids
        if len(tokens) > 1:  # a template may leave out all that is said; a single token predicts nothing
            yield _Row(tokens, frozenset([index]))


def _text(documents: Documents, index: int) -> str:
    entry = documents.entries[index]
    if not isinstance(entry, str):
        raise BadInput(
            f"{documents.source} holds conversations; use them for calibration, and with a chat template."
        )
    return entry


def _documents(source: str | Documents, tokens: int | None) -> Documents:
    """The documents of ``source``; of one that may be endless, enough for ``tokens`` of 8 characters each."""
    if isinstance(source, Documents):
        return source
    return read_documents(source, None if tokens is None else 8 * tokens)


def _first(count: int | None, rows: Iterator[_Row]) -> list[_Row]:
    return list(islice(rows, None if count is None else min(count, sys.maxsize)))


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
