"""A checkpoint under construction: the tensors that a step changes, and references to all others."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch

from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import DTYPE_NAMES, TensorInfo, TensorSource, own
from compress.storage.writer import write_tensors
from compress.system.files import write_atomically


class Draft(Checkpoint):
    """A child of ``parent`` under construction, kept in ``folder``.

    It starts equal to its parent. `write`, `alias` and `drop` change the table. `flush` makes all changes so
    far durable, so that a resumed run can go back to them with `restore`.
    """

    TABLE = "draft.json"

    def __init__(self, parent: Checkpoint, folder: Path) -> None:
        super().__init__(folder, copy.deepcopy(parent.config), dict(parent.tensors), dict(parent.sources))
        self.parent = parent
        self._buffer: dict[str, torch.Tensor] = {}

    @cached_property
    def sha256(self) -> str:
        """Hash as of a folder, and of which tensors of the files are used, and under which names."""
        keys = sorted((name, source.key) for name, source in self.sources.items())
        return hashlib.sha256(json.dumps([super().sha256, keys]).encode()).hexdigest()

    def restore(self, table: Path | None = None) -> None:
        """Go back to the state that was written by the `flush` with this ``table`` (None for draft.json)."""
        saved = json.loads((table or self.folder / self.TABLE).read_text(encoding="utf-8"))
        self.config = saved["config"]
        self.tensors = {k: TensorInfo(v[0], tuple(v[1])) for k, v in saved["tensors"].items()}
        self.sources = {name: self._source(of) for name, of in saved["sources"].items()}
        self._buffer.clear()

    def _source(self, saved: str | list[str]) -> TensorSource:
        """Where a tensor is now that a table names as one of the parent, or in a file of the draft.

        The folders of both may have been moved since the table was written.
        """
        if isinstance(saved, str):
            return self.parent.sources[saved]
        file, key, dtype = saved
        return TensorSource(str((self.folder / file).absolute()), key, dtype)

    def reset(self) -> None:
        """Become equal to the parent again."""
        self.config = copy.deepcopy(self.parent.config)
        self.tensors, self.sources = dict(self.parent.tensors), dict(self.parent.sources)
        self._buffer.clear()

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add or replace tensors. Copies are kept in memory until the next `flush`."""
        for name, tensor in tensors.items():
            self._buffer[name] = tensor = own(tensor)
            self.tensors[name] = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            self.sources.pop(name, None)

    def alias(self, name: str, parent_name: str) -> None:
        """Make ``name`` refer to the parent's tensor ``parent_name``."""
        self._buffer.pop(name, None)
        self.tensors[name] = self.parent.tensors[parent_name]
        self.sources[name] = self.parent.sources[parent_name]

    def drop(self, name: str) -> None:
        """Remove a tensor if it is there."""
        self._buffer.pop(name, None)
        self.tensors.pop(name, None)
        self.sources.pop(name, None)

    def rename(self, names: Mapping[str, str]) -> None:
        """Keep only the tensors in ``names`` (old name -> new name), under their new names."""
        self._buffer = {new: self._buffer[old] for old, new in names.items() if old in self._buffer}
        self.tensors = {new: self.tensors[old] for old, new in names.items()}
        self.sources = {new: self.sources[old] for old, new in names.items() if old in self.sources}

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        found = {name: self._buffer[name].clone() for name in names if name in self._buffer}
        return found | super().read_many(name for name in names if name not in found)

    def flush(self, tag: str, table: Path | None = None) -> None:
        """Write the buffered tensors into ``{tag}.safetensors``, then the table.

        Args:
            tag: name of the file of tensors, which is replaced if it exists.
            table: path of the table; None for draft.json. A journal gives paths of its own, so that the
                tables of its last two layers exist side by side.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._buffer:
            file = self.folder / f"{tag}.safetensors"
            write_tensors(self._buffer, file)
            for name in self._buffer:
                self.sources[name] = TensorSource(str(file.absolute()), name, self.tensors[name].dtype)
            self._buffer.clear()
        inherited = {source: name for name, source in self.parent.sources.items()}
        document = {
            "config": self.config,
            "tensors": {k: [v.dtype, v.shape] for k, v in self.tensors.items()},
            "sources": {
                k: inherited.get(v, [Path(v.file).name, v.key, v.stored_dtype])
                for k, v in self.sources.items()
            },
        }
        write_atomically(table or self.folder / self.TABLE, json.dumps(document))
