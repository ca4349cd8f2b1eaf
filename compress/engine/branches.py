"""The hidden states of several variants of one model that is streamed once."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.engine.activations import Activations
from compress.engine.stream import Layer, Stream


class Branches:
    """Variants of a model that each lack one block: their hidden states before the layer that comes next.

    Up to the layer of its missing block a branch is the same as the model itself, the prefix; from there on
    it has hidden states of its own.

    Args:
        count: number of branches.
        prefix: the stream through the model itself.
        file: hidden states above the memory limit go into files there.
    """

    def __init__(self, count: int, prefix: Stream, file: Path) -> None:
        self._prefix = prefix
        windows, length, width = prefix.hidden.shape
        self._hidden = Activations((count * windows, length, width), file, device=prefix.device)
        self._windows = windows

    def begin(self, number: int, layer: Layer) -> None:
        """Let a branch leave the prefix at ``layer``, whose block is switched off by the caller."""
        for start, hidden, _ in self._prefix.batches():
            self._write(number, start, self._prefix.call(layer, start, hidden))

    def advance(self, number: int, layer: Layer) -> None:
        """Take a branch through a layer."""
        for start in self._prefix.starts:
            stop = min(start + self._prefix.batch_size, self._windows)
            hidden = self._hidden.read(number * self._windows + start, number * self._windows + stop)
            self._write(number, start, self._prefix.call(layer, start, hidden))

    def _write(self, number: int, start: int, hidden: torch.Tensor) -> None:
        self._hidden.write(number * self._windows + start, hidden)

    def flip(self) -> None:
        """Let `read` and `advance` see what was written; to be called after each layer."""
        self._hidden.flip()

    def read(self, number: int, window: int) -> torch.Tensor:
        """One window of a branch: float32 [S, D]."""
        place = number * self._windows + window
        return self._hidden.read(place, place + 1)[0]
