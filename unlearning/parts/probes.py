"""Text to forget and to retain on its way through a model, for methods that measure and do not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from compress.calibration.text.records import (
    IGNORED,
    Records,
    TokenSequence,
    check_apart,
    collate,
    read_records,
)
from compress.engine.shape import ModelShape
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.unlearning.parts.options import ForgetOptions


def check_generates(shape: ModelShape, method: str) -> None:
    """Make sure that a model predicts the next token.

    Raises:
        BadInput: it is an encoder, or has no head.
    """
    if shape.anatomy.kind != "decoder" or shape.anatomy.head is None:
        raise BadInput(f"{method} unlearns next-token predictions, but this model makes none.")


def both_sets(options: ForgetOptions) -> tuple[Records, Records]:
    """The records to forget and to retain.

    Raises:
        BadInput: one of them cannot be read, or they share a record.
    """
    forget, retain = read_records(options.forget, "forget"), read_records(options.retain, "retain")
    check_apart(forget, retain)
    return forget, retain


def windows_of(sequences: Sequence[TokenSequence], source: str) -> Windows:
    """Sequences as windows, padded on the right: as many as there are sequences."""
    batch = collate(sequences, pad=0)
    return Windows(batch["input_ids"], batch["attention_mask"].bool(), source)


def prompts_of(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """What comes before the answer of each sequence; of prose, all of it."""
    return [_prompt_of(sequence) for sequence in sequences]


def _prompt_of(sequence: TokenSequence) -> TokenSequence:
    given = len(list(takewhile(lambda label: label == IGNORED, sequence.labels)))
    # The first token of prose is not learned either.
    length = given if given > 1 else len(sequence.tokens)
    return replace(sequence, tokens=sequence.tokens[:length], labels=sequence.labels[:length])


def split(count: int, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from 0 to ``count`` in two parts by chance: the rest, and a ``share`` of at least one."""
    order = torch.randperm(count, generator=generator)
    held = max(1, round(share * count))
    return order[held:].sort().values, order[:held].sort().values
