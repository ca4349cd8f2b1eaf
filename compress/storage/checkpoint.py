"""Model folders read lazily, and folders written tensor by tensor.

A `Checkpoint` is a table of names over safetensors files: nothing but headers is read until a tensor is
asked for. A `Draft` is a child checkpoint under construction: most of its entries point into its parent's
files, so a step that changes one tensor writes one tensor. `write_weights` turns any of them into
ordinary Hugging Face shards, holding one tensor at a time.
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
    """A model folder, read lazily.

    Attributes:
        config: config.json as a dict.
        tensors: name -> `TensorInfo`, in the order of the files; dtypes are those `read` returns.
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
            folder: holds config.json and *.safetensors (with an index if there are several).
            dtype: round every floating-point tensor to this dtype when it is read ("BF16", "F16", "F32").

        Raises:
            BadInput: no such folder, not a model folder, a file missing, truncated or not what it says.
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
                folder / adapter.KEY / adapter.WEIGHTS, None, dtype, tensors, sources, adapter.stored_name
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
        """Add the tensors of a file to the tables, under the names that ``name_of`` gives to its keys."""
        with _open(file) as handle:
            keys = list(handle.keys())
            missing = wanted - set(keys) if wanted is not None else set()
            if missing:
                raise BadInput(f"{file} lacks the tensor '{min(missing)}' that the index lists in it.")
            for key in keys:
                view = handle.get_slice(key)
                stored = view.get_dtype()
                if stored not in DTYPES:
                    raise BadInput(f"{file} stores '{key}' as {stored}, which cannot be read here.")
                read_as = dtype if dtype and stored in CASTABLE else stored
                tensors[name_of(key)] = TensorInfo(read_as, tuple(view.get_shape()))
                sources[name_of(key)] = TensorSource(str(file.absolute()), key, stored)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own memory (not a view of the file), with the dtype in `tensors`."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors, opening each file once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.sources[name].file, []).append(name)
        found = {}
        for file, group in by_file.items():
            with _open(Path(file)) as handle:
                for name in group:
                    source, info = self.sources[name], self.tensors[name]
                    tensor = handle.get_tensor(source.key)
                    # A copy, so that the pages of the mapped file are given back when it is closed.
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
        """Hash of the model: config.json and every weight file's bytes, independent of paths."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({source.file for source in self.sources.values()}):
            digest.update(file_sha256(Path(file)).encode())
        return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        BadInput: it is missing, not JSON, or the folder is a LoRA adapter.
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
    """The safetensors files of a folder -> the names the index wants of each (None without an index)."""
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if whole.exists():  # transformers looks here first, too; other files may be copies in other layouts
        return {whole: None}
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                files.setdefault(folder / Path(file).name, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{index} is not a safetensors index.") from None
        for file in files:
            if not file.exists():
                raise BadInput(f"{file} is missing, though the index of '{folder}' lists it.")
        return files
    files = dict.fromkeys(sorted(folder.glob("*.safetensors")))
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))):
        raise BadInput(
            f"'{folder}' holds pickled weights only, which can run code; convert it to safetensors."
        )
    if not files:
        raise BadInput(f"The model folder '{folder}' holds no *.safetensors weights.")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged or not a safetensors file ({error}).") from None
