"""Hidden states of many windows: on the device or in memory up to a limit, in files above it."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.errors import DamagedWork
from compress.system.device import total_memory
from compress.system.files import fsync

MEMORY_LIMIT = 1 << 30
"""Bytes of hidden states that are held in memory; others ask `memory_limit`."""

DEVICE_SHARE = 1 / 16
"""The share of a device's memory that hidden states may take there; others ask `device_limit`. A method holds
up to half a dozen of them at once, beside a layer."""


def memory_limit(shared_by: int = 1) -> int:
    """Bytes that each of ``shared_by`` tensors may take in memory, so that all together keep the limit."""
    return MEMORY_LIMIT // max(1, shared_by)


def device_limit(device: str, shared_by: int = 1) -> int:
    """The same for the memory of a device; 0 for the CPU, which has none of its own."""
    return int(total_memory(device) * DEVICE_SHARE) // max(1, shared_by)


class Activations:
    """A float32 tensor [N, S, D] that is written and read in slices of windows.

    A tensor within the memory limit is held in memory, that of the device where it is large enough. A larger
    one is held in files that take turns: one is read, one is written, and the one that holds the last state
    made durable is left alone; there are three, because that may be neither of the others. What is written
    before anything was saved or restored goes into a file of its own, because a resumed run writes it again
    while it does not know yet which file holds the state to go back to.

    Args:
        shape: [N, S, D].
        file: where the files go; their names begin with its name. Without it everything stays in memory and
            cannot be saved.
        shared_by: how many tensors of this size are held at once and share the memory limit.
        device: where they are computed with.
    """

    def __init__(
        self, shape: tuple[int, int, int], file: Path | None, shared_by: int = 1, device: str = "cpu"
    ) -> None:
        self.shape, self.device = shape, device
        size = 4 * shape[0] * shape[1] * shape[2]
        place = device if size <= device_limit(device, shared_by) else "cpu"
        self.spilled = place == "cpu" and file is not None and size > memory_limit(shared_by)
        self._memory = torch.zeros(0 if self.spilled else shape, dtype=torch.float32, device=place)
        self._changed = True
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._slots = [file.with_name(f"{file.name}.{slot}") for slot in (0, 1, 2)]
            self._begin = self._source = self._target = file.with_name(f"{file.name}.begin")
            self._durable: Path | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of the windows ``start`` to ``stop`` on the device: [stop - start, S, D].

        Raises:
            DamagedWork: the file is cut short or gone.
        """
        if not self.spilled:
            return self._memory[start:stop].to(self.device, copy=True)
        values = torch.empty((stop - start, *self.shape[1:]), dtype=torch.float32)
        _read_into(values, self._source, start * values[0].nbytes)
        return values.to(self.device)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Set the windows from ``start`` on; where they go into a file, `read` sees them after `flip`."""
        self._changed = True
        if not self.spilled:
            self._memory[start : start + len(values)] = values
            return
        self._target.touch()
        with self._target.open("r+b") as file:
            file.seek(start * values[0].nbytes)
            file.write(_bytes(values.detach().float().cpu().contiguous()))

    def flip(self) -> None:
        """Let `read` see what was written."""
        if self.spilled:
            self._turn(self._target)

    def save(self) -> str:
        """Make the values durable, and return the name of the file that holds them, for `restore`."""
        if self._changed:
            if not self.spilled:
                self._target.write_bytes(_bytes(self._memory.cpu()))
                self._turn(self._target)
            if self._source.exists():
                fsync(self._source)
            if self._begin not in (self._source, self._durable):
                self._begin.unlink(missing_ok=True)
            self._durable = self._source
            self._turn(self._source)
            self._changed = False
        return self._source.name

    def restore(self, name: str) -> None:
        """Go back to the values that `save` made durable in the file ``name``.

        Raises:
            DamagedWork: the file is cut short or gone.
        """
        self._durable = self._source.with_name(name)
        self._turn(self._durable)
        if self._source != self._begin:
            self._begin.unlink(missing_ok=True)
        if not self.spilled:
            values = torch.empty(self.shape, dtype=torch.float32)
            _read_into(values, self._source, 0)
            self._memory.copy_(values)
            self._changed = False

    def _turn(self, source: Path) -> None:
        self._source = source
        self._target = next(slot for slot in self._slots if slot not in (source, self._durable))


def _read_into(values: torch.Tensor, path: Path, offset: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(_bytes(values))
    except FileNotFoundError:
        found = 0
    if found != values.nbytes:
        raise DamagedWork(
            f"The activations in '{path}' are cut short or gone; start over, with --fresh where the command "
            "has it."
        )


def _bytes(values: torch.Tensor) -> memoryview:
    return values.numpy().data.cast("B")
