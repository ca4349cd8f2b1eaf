"""A record of the layers that a walk has finished, so that a killed run continues from there."""

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
    """Makes a walk over layers resumable: after each layer it saves all that the walk has produced so far.

    The loop body keeps its results in ``state``, which is saved and restored together with the streams and
    the draft. So a body that reads and writes nothing else is resumable. A walk whose journal is finished
    runs no layer; it only restores all of these as they were at its end.

    Args:
        folder: where everything is saved.
        draft: the model that is being written, if the walk writes one.

    Attributes:
        state: name -> tensor.
    """

    def __init__(self, folder: Path, draft: Draft | None = None) -> None:
        self.folder = folder
        self.draft = draft
        self.state: dict[str, torch.Tensor] = {}

    def activations(self, name: str, shape: tuple[int, int, int], device: str = "cpu") -> Activations:
        """New activations [N, S, D] for a device, whose files are in the journal's folder."""
        return Activations(shape, self.folder / name, device=device)

    def restore(self, held: list[Activations]) -> int:
        """Bring ``state``, the draft and the activations back to the last commit.

        Returns:
            How many layers are finished; 0 if nothing was committed, in which case nothing changes.

        Raises:
            DamagedWork: a file of activations is cut short or gone.
        """
        path = self.folder / "progress.json"
        if not path.exists():
            return 0
        progress = json.loads(path.read_text())
        for activations, name in zip(held, progress["activations"], strict=True):
            activations.restore(name)
        self.state.clear()
        self.state.update(load_file(self.folder / progress["state"]))
        if self.draft is not None:
            # Not the draft's last flush: the process may have been killed between that and progress.json.
            self.draft.restore(self.folder / progress["draft"])
        return progress["finished"]

    def commit(self, finished: int, held: list[Activations]) -> None:
        """Make everything up to layer ``finished`` (exclusive) durable."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Files take turns in pairs, so that those named by progress.json are never the ones being written.
        turn = finished % 2
        state, draft = f"state-{turn}.safetensors", f"draft-{turn}.json"
        if self.draft is not None:
            self.draft.flush(f"{self.folder.name}-{finished:05d}", self.folder / draft)
        write_tensors(self.state, self.folder / state)
        names = [item.save() for item in held]
        progress = {"finished": finished, "state": state, "draft": draft, "activations": names}
        write_atomically(self.folder / "progress.json", json.dumps(progress))
