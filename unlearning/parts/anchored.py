"""The text to forget as a method works on it: records, anchors, and the blocks that are made of them."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.calibration.text.corpora import CORPORA
from compress.calibration.text.records import (
    Record,
    Records,
    TokenSequence,
    check_apart,
    read_records,
    sequences,
)
from compress.calibration.text.tokens import separator
from compress.errors import BadInput
from compress.unlearning.parts.anchors import Anchors, check_offsets, read_anchors
from compress.unlearning.parts.generic_labels import Block, Blocks
from compress.unlearning.parts.proposer import propose_anchors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Material(NamedTuple):
    """What a run works on.

    Attributes:
        sequences: the text to forget.
        blocks: of the sequences, in their order.
        anchors: of the text.
        pad: the token that fills up batches.
        details: where all this comes from, for the report.
    """

    sequences: list[TokenSequence]
    blocks: list[Block]
    anchors: Anchors
    pad: int
    details: dict[str, Any]


def read_material(
    forget_set: str,
    retain_set: str | None,
    anchors_file: str | None,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    generator: torch.Generator,
) -> Material:
    """Read the records and the anchors, and make blocks of them.

    Args:
        forget_set, retain_set: see `read_records`.
        anchors_file: see `read_anchors`; without one, anchors are proposed.
        tokenizer: of the model.
        seqlen: see `sequences`.
        generator: draws the stand-ins of proposed anchors.

    Raises:
        BadInput: sets that are empty, overlap or are no records; anchors in another shape; a tokenizer that
            does not know which characters a token spans; texts of single tokens.
    """
    forget = read_records(forget_set)
    retain = read_records(retain_set, "retain") if retain_set is not None else None
    if retain is not None:
        check_apart(forget, retain)
    check_offsets(tokenizer)
    if anchors_file is None:
        anchors = _proposed(forget, retain, tokenizer, generator)
    else:
        anchors = read_anchors(anchors_file)
    pieces = sequences(forget, tokenizer, seqlen)
    maker = Blocks(tokenizer, anchors)
    blocks = [maker.block(piece) for piece in pieces]
    if not any(block.targets for block in blocks):
        raise BadInput(f"No token of '{forget_set}' can be given a label.")
    found = sum(block.anchors for block in blocks)
    if not found:
        log.warning("None of the %d anchors is in '%s'.", len(anchors.entries), forget_set)
    # Not in the details: a published model should not list what it was made to forget.
    log.info("The anchors: %s", json.dumps(dict(anchors.entries), ensure_ascii=False))
    details = {
        "forget": forget.described,
        "retain": retain and retain.described,
        "anchors": {
            "source": anchors.source,
            "number": len(anchors.entries),
            "found": found,
            "sha256": anchors.sha256,
        },
    }
    return Material(
        sequences=pieces,
        blocks=blocks,
        anchors=anchors,
        pad=separator(tokenizer),
        details=details,
    )


def _proposed(
    forget: Records, retain: Records | None, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> Anchors:
    """Anchors that are rare in what is retained and in the bundled World Factbook (`propose_anchors`)."""

    def common(word: str) -> bool:
        return len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1

    others = [_texts(retain)] if retain is not None else []
    bundled = [text for name in ("bundled", "bundled:evaluation") for text in CORPORA[name].read()]
    return propose_anchors(_texts(forget), [*others, bundled], common, generator)


def _texts(records: Records) -> list[str]:
    """Every text of the records: prose, questions, answers and messages."""

    def of(record: Record) -> list[str | None]:
        said = [message["content"] for message in record.messages or ()]
        return [record.text, record.question, record.answer, *said]

    return [text for record in records.entries for text in of(record) if text]
