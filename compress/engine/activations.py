"""Hidden states of many windows, in memory up to a limit and above it in files."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.errors import CompressError
from compress.system.files import fsync

MEMORY_LIMIT = 1 << 30
"""Bytes that one tensor of hidden states may take in memory."""


class Activations:
    """float32 tensor [N, S, D] written and read in slices of windows.

    Up to ``memory_limit`` bytes it is held in memory, above that in a file. Two files change roles: one is
    read, and is the last state made durable; the other is written. So between two saves every window may be
    written once. What is written before anything was saved or restored goes into a third file, because a
    resumed run writes it again while one of the two holds the state to go back to.

    Args:
        shape: [N, S, D].
        file: where the files go, without it everything stays in memory and cannot be saved.
        memory_limit: bytes, MEMORY_LIMIT if not given.
    """

    def __init__(
        self, shape: tuple[int, int, int], file: Path | None, memory_limit: int | None = None
    ) -> None:
        self.shape = shape
        limit = MEMORY_LIMIT if memory_limit is None else memory_limit
        self.spilled = file is not None and 4 * shape[0] * shape[1] * shape[2] > limit
        self._memory = None if self.spilled else torch.zeros(shape, dtype=torch.float32)
        self._changed = True
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._slots = [file.with_name(f"{file.name}.{slot}") for slot in (0, 1)]
            self._begin = self._source = self._target = file.with_name(f"{file.name}.begin")

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of the windows ``start`` to ``stop``: [stop - start, S, D]."""
        if not self.spilled:
            return self._memory[start:stop].clone()
        values = torch.empty((stop - start, *self.shape[1:]), dtype=torch.float32)
        _read_into(values, self._source, start * values[0].nbytes)
        return values

    def write(self, start: int, values: torch.Tensor) -> None:
        """Set the windows from ``start`` on; if they are in a file, `read` sees them after `flip`."""
        self._changed = True
        if not self.spilled:
            self._memory[start : start + len(values)] = values
            return
        self._target.touch()
        with self._target.open("r+b") as file:
            file.seek(start * values[0].nbytes)
            file.write(_bytes(values.detach().float().cpu().contiguous()))

    def flip(self) -> None:
        """What was written is what is read from now on."""
        if self.spilled:
            self._turn(self._target)

    def save(self) -> str:
        """Make the values durable; the name of the file that holds them, for `restore`."""
        if self._changed:
            if not self.spilled:
                self._target.write_bytes(_bytes(self._memory))
                self._turn(self._target)
            if self._source.exists():
                fsync(self._source)
            if self._source == self._slots[1]:  # so what was saved before is in the other one
                self._begin.unlink(missing_ok=True)
            self._changed = False
        return self._source.name

    def restore(self, name: str) -> None:
        """Go back to what `save` made durable.

        Raises:
            CompressError: the file is cut short or gone.
        """
        self._turn(self._source.with_name(name))
        if self._source != self._begin:
            self._begin.unlink(missing_ok=True)
        if not self.spilled:
            _read_into(self._memory, self._source, 0)
            self._changed = False

    def _turn(self, source: Path) -> None:
        self._source = source
        self._target = self._slots[1] if source == self._slots[0] else self._slots[0]


def _read_into(values: torch.Tensor, path: Path, offset: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(_bytes(values))
    except FileNotFoundError:
        found = 0
    if found != values.nbytes:
        raise CompressError(f"The activations in '{path}' are cut short or gone; start over with --fresh.")


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.numpy()).cast("B")
