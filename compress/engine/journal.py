"""What a walk over layers has finished, so that a killed run goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from compress.engine.activations import Activations
from compress.storage.draft import Draft
from compress.storage.writer import write_tensors
from compress.system.files import write_atomically


class Journal:
    """What a walk has finished, in a folder: enough to go on after a kill.

    ``state`` is a dict of tensors that the loop body keeps its results in; it is saved and restored with
    the streams and the draft, so a body that reads and writes nothing else is resumable. A walk whose journal
    is finished does nothing but bring all of these to where they were at its end.
    """

    def __init__(self, folder: Path, draft: Draft | None = None) -> None:
        self.folder = folder
        self.draft = draft
        self.state: dict[str, torch.Tensor] = {}

    def activations(self, name: str, shape: tuple[int, int, int]) -> Activations:
        """Room for activations [N, S, D] that spills into the journal's folder."""
        return Activations(shape, self.folder / name)

    def restore(self, held: list[Activations]) -> int:
        """Bring ``state`` and the activations back; the number of layers finished (0 at the beginning)."""
        path = self.folder / "progress.json"
        if not path.exists():
            return 0
        progress = json.loads(path.read_text())
        for activations, name in zip(held, progress["activations"], strict=True):
            activations.restore(name)
        self.state.clear()
        self.state.update(load_file(self.folder / progress["state"]))
        if self.draft is not None:
            # Not what the draft was flushed with last: the kill may have come between that and progress.json.
            self.draft.restore(self.folder / progress["draft"])
        return progress["finished"]

    def commit(self, finished: int, held: list[Activations]) -> None:
        """Make everything up to layer ``finished`` (exclusive) durable."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two of each file in turn: those that progress.json names are never the ones being written.
        turn = finished % 2
        state, draft = f"state-{turn}.safetensors", f"draft-{turn}.json"
        if self.draft is not None:
            self.draft.flush(f"{self.folder.name}-{finished:05d}", self.folder / draft)
        write_tensors(self.state, self.folder / state)
        names = [item.save() for item in held]
        progress = {"finished": finished, "state": state, "draft": draft, "activations": names}
        write_atomically(self.folder / "progress.json", json.dumps(progress))
