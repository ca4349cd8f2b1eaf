"""What the model computes before it unlearns, for the losses that compare with it.

No second copy of the model is held while it is trained. The hidden states of the sequences are computed once,
layer by layer, and kept (in memory up to a limit, on disk above it); the frozen head makes exact logits of
them where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration.text.records import TokenSequence, collate
from compress.engine.journal import Journal
from compress.engine.windows import Windows
from compress.unlearning.parts.losses import negative_log_likelihood, predicts_scored

if TYPE_CHECKING:
    from compress.engine.head import Head
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext


class Reference:
    """The hidden states that the model has for some sequences before it unlearns.

    Args:
        model: the model as it is stored.
        sequences: N sequences.
        context: of the step. A killed run continues with the layer where it was.
        name: of the folder for the hidden states inside the step's own; each reference has another.
        layers: how many layers the sequences go through; None: all of them.

    Raises:
        BadInput: a sequence is longer than the model's table of positions.
        CompressError: a layer puts out NaN or infinite values.
    """

    def __init__(
        self,
        model: StreamedModel,
        sequences: Sequence[TokenSequence],
        context: StepContext,
        name: str,
        layers: int | None = None,
    ) -> None:
        batch = collate(sequences, 0)
        self.labels = batch["labels"]
        windows = Windows(batch["input_ids"], batch["attention_mask"].bool(), name)
        folder = context.folder / f"reference-{name}"
        stream = model.stream(windows, folder)
        for layer in model.walk(Journal(folder), stream, stop=layers, label="computing the reference"):
            stream.advance(layer)
        self.hidden = stream.hidden
        self._rows = {(part.tokens, part.labels): row for row, part in enumerate(sequences)}

    def rows(self, part: dict[str, Tensor]) -> list[int]:
        """The numbers of the sequences in a part of a batch (see `collate`)."""
        lengths = part["attention_mask"].sum(1).tolist()
        columns = zip(part["input_ids"].tolist(), part["labels"].tolist(), lengths, strict=True)
        return [self._rows[tuple(tokens[:n]), tuple(labels[:n])] for tokens, labels, n in columns]

    @torch.no_grad()
    def states(self, rows: Sequence[int]) -> Tensor:
        """The hidden states that predict the scored tokens of the sequences ``rows``: float32 [T, D]."""
        return torch.cat([self._states(row) for row in rows])

    @torch.no_grad()
    def logits(self, head: Head, rows: Sequence[int]) -> Tensor:
        """The logits of the scored tokens of the sequences ``rows``: float32 [T, V].

        Args:
            head: of the model; the sequences must have gone through all layers.
            rows: numbers of sequences.
        """
        # One by one, because models with a table of positions take no longer input.
        return torch.cat([head(self._states(row)[None]).logits[0].float() for row in rows])

    @torch.no_grad()
    def losses(self, head: Head) -> Tensor:
        """N of every sequence (see `negative_log_likelihood`): float32 [N], on the device of the head."""
        found = []
        for row, labels in enumerate(self.labels):
            logits = head(self.hidden.read(row, row + 1)).logits
            found.append(negative_log_likelihood(logits, labels[None].to(logits.device)))
        return torch.cat(found)

    def _states(self, row: int) -> Tensor:
        states = self.hidden.read(row, row + 1)[0, :-1]
        return states[predicts_scored(self.labels[row : row + 1])[0].to(states.device)]
