"""What the model computes before it unlearns, for the losses that compare with it.

No second copy of the model is held while it is trained. The hidden states of the sequences are computed once,
layer by layer, and kept (in memory up to a limit, on disk above it); the frozen head makes exact logits of
them where they are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration.text.records import TokenSequence, collate
from compress.engine.journal import Journal
from compress.engine.windows import Windows
from compress.unlearning.parts.losses import negative_log_likelihood, scored_rows

if TYPE_CHECKING:
    from compress.engine.activations import Activations
    from compress.engine.head import Head
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

SHORTEST = 16
"""Tokens up to which sequences count as of one length; above, those up to each power of two do."""


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
        self._sequences = sequences
        self._rows = {(part.tokens, part.labels): row for row, part in enumerate(sequences)}
        # Those of about one length go together, so that little is computed of padding.
        alike: dict[int, list[int]] = defaultdict(list)
        for row, part in enumerate(sequences):
            alike[max(SHORTEST, 1 << (len(part.tokens) - 1).bit_length())].append(row)
        folder = context.folder / f"reference-{name}"
        streams = []
        self._places: dict[int, tuple[Activations, int]] = {}
        for width, rows in sorted(alike.items()):
            batch = collate([sequences[row] for row in rows], 0)
            windows = Windows(batch["input_ids"], batch["attention_mask"].bool(), name)
            streams.append(model.stream(windows, folder / str(width)))
            self._places |= {row: (streams[-1].hidden, place) for place, row in enumerate(rows)}
        for layer in model.walk(Journal(folder), *streams, stop=layers, label="computing the reference"):
            for stream in streams:
                stream.advance(layer)

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
        for row, part in enumerate(self._sequences):
            logits = head(self._hidden(row)).logits
            labels = torch.tensor([part.labels], device=logits.device)
            found.append(negative_log_likelihood(logits, labels))
        return torch.cat(found)

    def _states(self, row: int) -> Tensor:
        return scored_rows(self._hidden(row), torch.tensor([self._sequences[row].labels]))

    def _hidden(self, row: int) -> Tensor:
        """The hidden states of one sequence, without padding: [1, S, D]."""
        hidden, place = self._places[row]
        return hidden.read(place, place + 1)[:, : len(self._sequences[row].tokens)]
