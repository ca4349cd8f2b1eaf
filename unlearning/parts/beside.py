"""The records to retain that stand beside those to forget in every step of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.text.records import TokenSequence, collate
from compress.unlearning.parts.training import Batch, batches

if TYPE_CHECKING:
    from transformers import TrainerCallback

RETAIN = "retain"
"""The role of these sequences in a batch."""


class Beside:
    """The batches of a retain set, one for each step.

    Most retain sets are larger than the forget set. They are gone through in random order over all epochs, so
    that as much as possible of them is seen. A batch depends on the seed and the number of the step alone, so
    a run that was killed goes on with the same ones.

    Args:
        retain: sequences to retain; if there are none, batches stay as they are.
        size: sequences in a batch.
        steps: of the training.
        pad: the token that fills up batches.
        generator: draws the order.

    Attributes:
        step: the present one, from 0; `follow` keeps it.
    """

    def __init__(
        self,
        retain: Sequence[TokenSequence],
        size: int,
        steps: int,
        pad: int,
        generator: torch.Generator,
    ) -> None:
        self.step = 0
        self._retain, self._pad = retain, pad
        lengths = [len(sequence.tokens) for sequence in retain]
        rounds = math.ceil(steps / math.ceil(len(retain) / size)) if retain else 0
        self._order = batches(lengths, size, rounds, generator)

    def add_to(self, batch: Batch) -> Batch:
        """A batch with the sequences to retain of the present step, on the same device."""
        if not self._retain:
            return batch
        part = collate([self._retain[index] for index in self._order[self.step]], self._pad)
        device = next(iter(batch.values()))["input_ids"].device
        return {**batch, RETAIN: {key: values.to(device) for key, values in part.items()}}

    def follow(self) -> TrainerCallback:
        """What tells which step of a training begins."""
        from transformers import TrainerCallback

        beside = self

        class Follow(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                beside.step = state.global_step

        return Follow()
