"""Model folders that are read lazily.

A `Checkpoint` is a table of the tensors in safetensors files. Only the headers of the files are read until a
tensor is needed. A `compress.storage.draft.Draft` is a child checkpoint under construction: most of its
entries point into the files of its parent, so a step that changes one tensor writes one tensor.
`compress.storage.writer.write_weights` writes either as Hugging Face shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import BadInput
from compress.storage import adapter
from compress.storage.tensors import CASTABLE, DTYPES, TensorInfo, TensorSource
from compress.system.files import file_sha256


class Checkpoint:
    """A model folder that is read lazily.

    Attributes:
        folder: the model folder.
        config: config.json as a dict.
        tensors: name -> dtype, as `read` returns it, and shape. The order is that of the files.
        sources: name -> where the tensor is stored.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        sources: dict[str, TensorSource],
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.sources = sources

    @classmethod
    def open(cls, folder: str | Path, dtype: str | None = None) -> Checkpoint:
        """Open a Hugging Face model folder.

        Args:
            folder: contains config.json and *.safetensors, with an index if there are several.
            dtype: "BF16", "F16" or "F32" to round floating-point tensors to when they are read; None keeps
                their dtypes.

        Raises:
            BadInput: the folder does not exist or is not a model folder, or a file is missing or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BadInput(f"There is no model folder '{folder}'.")
        config = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        sources: dict[str, TensorSource] = {}
        for file, wanted in _weight_files(folder).items():
            cls._list(file, wanted, dtype, tensors, sources)
        if not tensors:
            raise BadInput(f"The model folder '{folder}' holds no weights.")
        if adapter.KEY in config:
            cls._list(
                folder / adapter.KEY / adapter.WEIGHTS_FILE,
                None,
                dtype,
                tensors,
                sources,
                adapter.stored_name,
            )
        if dtype:
            config = {**config, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
            config.pop("torch_dtype", None)
        return cls(folder, config, tensors, sources)

    @staticmethod
    def _list(
        file: Path,
        wanted: set[str] | None,
        dtype: str | None,
        tensors: dict[str, TensorInfo],
        sources: dict[str, TensorSource],
        name_of: Callable[[str], str] = str,
    ) -> None:
        """Add the tensors of a file to the tables, under the names that ``name_of`` gives to its keys.

        Raises:
            BadInput: the file is damaged, or lacks one of the ``wanted`` keys.
        """
        with _open(file) as handle:
            keys = list(handle.keys())
            missing = wanted - set(keys) if wanted is not None else set()
            if missing:
                raise BadInput(f"{file} lacks the tensor '{min(missing)}' that the index lists in it.")
            for key in keys:
                view = handle.get_slice(key)
                stored = view.get_dtype()
                if stored not in DTYPES:
                    raise BadInput(f"{file} stores '{key}' as {stored}, which is not supported.")
                read_as = dtype if dtype and stored in CASTABLE else stored
                tensors[name_of(key)] = TensorInfo(read_as, tuple(view.get_shape()))
                sources[name_of(key)] = TensorSource(str(file.absolute()), key, stored)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor with the dtype in `tensors`, on the CPU, in its own memory (not a view of the file)."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors as `read` returns them. Each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.sources[name].file, []).append(name)
        found = {}
        for file, group in by_file.items():
            with _open(Path(file)) as handle:
                for name in group:
                    source, info = self.sources[name], self.tensors[name]
                    tensor = handle.get_tensor(source.key)
                    # Copied, so that the pages of the mapped file are released when it is closed.
                    found[name] = (
                        tensor.to(DTYPES[info.dtype]) if info.dtype != source.stored_dtype else tensor.clone()
                    )
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of the content of config.json and of all weight files, independent of their paths."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({source.file for source in self.sources.values()}):
            digest.update(file_sha256(Path(file)).encode())
        return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in a model folder.

    Raises:
        BadInput: it is missing or not a JSON object, or the folder is a LoRA adapter.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise BadInput(f"'{folder}' is a LoRA adapter, not a model; merge it into its base model first.")
        raise BadInput(f"'{folder}' is not a model folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} is not a JSON object.")
    if adapter.KEY in config:
        config[adapter.KEY] = adapter.read_settings(folder)
    return config


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder -> the names that the index lists in each (None without an index).

    Raises:
        BadInput: there are no such files, or the index is damaged or lists a missing file.
    """
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if whole.exists():  # transformers looks here first as well; other files may be copies in other layouts
        return {whole: None}
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                listed.setdefault(folder / Path(file).name, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{index} is not a safetensors index.") from None
        for path in listed:
            if not path.exists():
                raise BadInput(f"{path} is missing, though the index of '{folder}' lists it.")
        return dict(listed)
    files: dict[Path, set[str] | None] = dict.fromkeys(sorted(folder.glob("*.safetensors")))
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))):
        raise BadInput(
            f"'{folder}' has only pickled weights, which can run code; convert them to safetensors."
        )
    if not files:
        raise BadInput(f"The model folder '{folder}' holds no *.safetensors weights.")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged or not a safetensors file ({error}).") from None
