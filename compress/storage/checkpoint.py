"""Model folders read lazily, and folders written tensor by tensor.

A `Checkpoint` is a table of names over safetensors files: nothing but headers is read until a tensor is
asked for. A `Draft` is a child checkpoint under construction: most of its entries point into its parent's
files, so a step that changes one tensor writes one tensor. `write_weights` turns any of them into
ordinary Hugging Face shards, holding one tensor at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import BadInput
from compress.storage import adapter
from compress.system.files import atomic, file_sha256, write_atomically

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASTABLE = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (safetensors spelling, such as ``BF16``) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor lies: the key in a safetensors file, and the dtype it was stored with there."""

    file: str
    key: str
    stored_dtype: str


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


class Draft(Checkpoint):
    """A child of ``parent`` under construction, kept in ``folder``.

    It starts equal to its parent. `write`, `alias` and `drop` change the table; `flush` makes everything
    up to now durable, so that a killed run finds it again with `restore`.
    """

    TABLE = "draft.json"

    def __init__(self, parent: Checkpoint, folder: Path) -> None:
        super().__init__(folder, copy.deepcopy(parent.config), dict(parent.tensors), dict(parent.sources))
        self.parent = parent
        self._buffer: dict[str, torch.Tensor] = {}

    def restore(self, table: Path | None = None) -> None:
        """Go back to what the `flush` that wrote ``table`` (draft.json if not given) made durable."""
        saved = json.loads((table or self.folder / self.TABLE).read_text(encoding="utf-8"))
        self.config = saved["config"]
        self.tensors = {k: TensorInfo(v[0], tuple(v[1])) for k, v in saved["tensors"].items()}
        self.sources = {k: TensorSource(*v) for k, v in saved["sources"].items()}
        self._buffer.clear()

    def reset(self) -> None:
        """Start over: equal to the parent again."""
        self.config = copy.deepcopy(self.parent.config)
        self.tensors, self.sources = dict(self.parent.tensors), dict(self.parent.sources)
        self._buffer.clear()

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add or replace tensors; copies of them are kept in memory until the next `flush`."""
        for name, tensor in tensors.items():
            self._buffer[name] = tensor = _own(tensor)
            self.tensors[name] = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            self.sources.pop(name, None)

    def alias(self, name: str, parent_name: str) -> None:
        """Let ``name`` stand for the parent's tensor ``parent_name``."""
        self._buffer.pop(name, None)
        self.tensors[name] = self.parent.tensors[parent_name]
        self.sources[name] = self.parent.sources[parent_name]

    def drop(self, name: str) -> None:
        """Leave the tensor out."""
        self._buffer.pop(name, None)
        self.tensors.pop(name, None)
        self.sources.pop(name, None)

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        found = {name: self._buffer[name].clone() for name in names if name in self._buffer}
        return found | super().read_many(name for name in names if name not in found)

    def flush(self, tag: str, table: Path | None = None) -> None:
        """Write what is buffered into ``{tag}.safetensors``, then the table. Writing a tag again replaces it.

        Args:
            tag: name of the file of tensors.
            table: where the table goes, draft.json if not given. A journal gives its own, so that the tables
                of its last two layers stand side by side.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._buffer:
            file = self.folder / f"{tag}.safetensors"
            write_tensors(self._buffer, file)
            for name in self._buffer:
                self.sources[name] = TensorSource(str(file.absolute()), name, self.tensors[name].dtype)
            self._buffer.clear()
        document = {
            "config": self.config,
            "tensors": {k: [v.dtype, v.shape] for k, v in self.tensors.items()},
            "sources": {k: [v.file, v.key, v.stored_dtype] for k, v in self.sources.items()},
        }
        write_atomically(table or self.folder / self.TABLE, json.dumps(document))


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


def write_weights(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    """Write every tensor into Hugging Face shards, one tensor in memory at a time.

    Those of an adapter go into a folder of their own.

    Args:
        checkpoint: what to write.
        folder: an existing folder; gets model.safetensors, or numbered shards and their index.
        max_shard_bytes: size limit of a shard in bytes; a single larger tensor gets its own.

    Returns:
        File name -> sha256.
    """
    hashes: dict[str, str] = {}
    if adapted := {n: i for n, i in checkpoint.tensors.items() if adapter.is_adapter(n)}:
        keys = {f"{adapter.PREFIX}{name}": info for name, info in adapted.items()}
        (folder / adapter.KEY).mkdir(exist_ok=True)
        hashes[f"{adapter.KEY}/{adapter.WEIGHTS}"] = _write_file(
            keys,
            lambda key: checkpoint.read(key.removeprefix(adapter.PREFIX)),
            folder / adapter.KEY / adapter.WEIGHTS,
        )
    base = {name: info for name, info in checkpoint.tensors.items() if name not in adapted}
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in base.items():
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    if len(shards) == 1:
        file = "model.safetensors"
        return {file: _write_file(base, checkpoint.read, folder / file), **hashes}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        infos = {name: checkpoint.tensors[name] for name in names}
        hashes[file] = _write_file(infos, checkpoint.read, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(info.nbytes for info in base.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return hashes


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file atomically.

    Unlike with the library's own writer, tensors may share memory, and a full disk is an ordinary OSError.
    """
    infos = {
        name: TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()
    }
    with atomic(path) as temporary:
        _write_file(infos, lambda name: _own(tensors[name]), temporary)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares no memory with anything."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _write_file(infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor], path: Path) -> str:
    """The safetensors format, streamed: the library's own writer wants all tensors in memory at once."""
    # Wide dtypes first, as the library orders them, so that every tensor is aligned to its item size; those
    # of one width in the order they are given, which is that in which a model in blocks is read.
    names = sorted(infos, key=lambda name: -DTYPES[infos[name].dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        info = infos[name]
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in names:
            tensor = read(name).contiguous().reshape(-1).view(torch.uint8)
            put(memoryview(tensor.numpy()))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
