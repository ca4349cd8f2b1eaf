"""Each record to forget beside another one to retain, in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.text.records import TokenSequence

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Pairs(Sequence[dict[str, TokenSequence]]):
    """The examples of a training: as many as there are sequences to forget.

    Most retain sets are larger than the forget set. They are gone through in random order, over the epochs,
    so that as much as possible of them is seen. What is paired depends on the seed, the example and the epoch
    alone, so a run that was killed goes on with the same pairs.

    Args:
        beside: role -> sequences, all of one length: those to forget and what belongs to them.
        retain: sequences to retain; if there are none, examples have no such role.
        generator: draws the order.

    Attributes:
        epoch: counted from 0.
    """

    def __init__(
        self,
        beside: Mapping[str, Sequence[TokenSequence]],
        retain: Sequence[TokenSequence],
        generator: torch.Generator,
    ) -> None:
        self.epoch = 0
        self._beside, self._retain = beside, retain
        self._order = torch.randperm(len(retain), generator=generator).tolist()

    def __len__(self) -> int:
        return len(next(iter(self._beside.values())))

    def __getitem__(self, index: Any) -> Any:
        example = {role: sequences[index] for role, sequences in self._beside.items()}
        if self._retain:
            place = (self.epoch * len(self) + index) % len(self._order)
            example["retain"] = self._retain[self._order[place]]
        return example

    def follow_epochs(self) -> TrainerCallback:
        """What tells the pairs which epoch of a training begins."""
        from transformers import TrainerCallback

        pairs = self

        class Follow(TrainerCallback):
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                pairs.epoch = int(state.epoch or 0)

        return Follow()
