"""Model folders that are read lazily.

A `Checkpoint` is a table of the tensors in safetensors files. Only the headers of the files are read until a
tensor is needed. A `compress.storage.draft.Draft` is a child checkpoint under construction: most of its
entries point into the files of its parent, so a step that changes one tensor writes one tensor.
`compress.storage.writer.write_weights` writes either as Hugging Face shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import BadInput
from compress.storage import adapter, sharded
from compress.storage.companions import is_inside
from compress.storage.tensors import CASTABLE, DTYPES, TensorInfo, TensorSource
from compress.system.files import file_sha256

DTYPE_KEYS = ("dtype", "torch_dtype")
"""What config.json calls the dtype of the weights; the second name is older."""

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
"""The beginning of the file that git keeps in place of a large one."""


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
        config = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        sources: dict[str, TensorSource] = {}
        index = _read_index(folder)
        for file in _weight_files(folder, index):
            here = file.relative_to(folder).as_posix()
            elsewhere = {name for name, listed in index.items() if listed != here}
            cls._list(file, elsewhere, dtype, tensors, sources)
        if missing := index.keys() - tensors.keys():
            name = min(missing)
            raise BadInput(f"{folder / index[name]} lacks the tensor '{name}' that the index lists in it.")
        if not tensors:
            raise BadInput(f"The model folder '{folder}' holds no weights.")
        if adapter.KEY in config:
            cls._list(
                folder / adapter.KEY / adapter.WEIGHTS_FILE,
                (),
                dtype,
                tensors,
                sources,
                adapter.stored_name,
            )
        if dtype:
            config = _without_dtype(config) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        return cls(folder, config, tensors, sources)

    @staticmethod
    def _list(
        file: Path,
        elsewhere: Container[str],
        dtype: str | None,
        tensors: dict[str, TensorInfo],
        sources: dict[str, TensorSource],
        name_of: Callable[[str], str] = str,
    ) -> None:
        """Add the tensors of a file to the tables, under the names that ``name_of`` gives to its keys.

        Args:
            elsewhere: keys that the index gives to another file; what this file has under them is stale.

        Raises:
            BadInput: the file is damaged, or holds a tensor that another file holds, too.
        """
        with _open(file) as handle:
            for key in handle.keys():  # noqa: SIM118 (it is no dict)
                if key in elsewhere:
                    continue
                view, name = handle.get_slice(key), name_of(key)
                stored = view.get_dtype()
                if stored not in DTYPES:
                    raise BadInput(f"{file} stores '{key}' as {stored}, which is not supported.")
                if name in sources:
                    raise BadInput(
                        f"Both {sources[name].file} and {file} hold the tensor '{key}', and no index says "
                        "which of the two counts; move one of the files away."
                    )
                read_as = dtype if dtype and stored in CASTABLE else stored
                tensors[name] = TensorInfo(read_as, tuple(view.get_shape()))
                sources[name] = TensorSource(str(file.absolute()), key, stored)

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
    def as_stored(self) -> Checkpoint:
        """The same model with the dtypes that its files have, whatever they are rounded to when read."""
        tensors = {
            name: TensorInfo(source.stored_dtype, self.tensors[name].shape)
            for name, source in self.sources.items()
        }
        written = read_config(self.folder)
        dtypes = {key: written[key] for key in DTYPE_KEYS if key in written}
        return Checkpoint(self.folder, _without_dtype(self.config) | dtypes, tensors, self.sources)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content of config.json and of all weight files, independent of their paths.

        That of an ensemble also depends on what it serves now.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({source.file for source in self.sources.values()}):
            digest.update(file_sha256(Path(file)).encode())
        if sharded.is_sharded(self.config):
            digest.update(file_sha256(self.folder / sharded.KEY / sharded.STATE).encode())
        return digest.hexdigest()


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in DTYPE_KEYS}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in a model folder, without sections that say nothing or name code.

    Raises:
        BadInput: folder or file is missing, it is no JSON object, or the folder is a LoRA adapter.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no model folder '{folder}'.")
    path = folder / "config.json"
    if not path.exists():
        _refuse_adapter(folder)
        if file := next(iter(sorted(folder.glob("*.gguf"))), None):
            raise BadInput(f"'{folder}' is not a model folder, but holds a GGUF file; give '{file}'.")
        raise BadInput(f"'{folder}' is not a model folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} is not a JSON object.")
    if isinstance(config.get("quantization"), dict):  # the name that mlx has for the section
        config["quantization_config"] = config["quantization"]
    if not config.get("quantization_config"):  # null or empty
        config.pop("quantization_config", None)
    elif not isinstance(config["quantization_config"], dict):
        raise BadInput(f"The quantization_config in {path} is not a JSON object.")
    if "pruned" not in config:  # code is not carried over, but for our own of a pruned model
        for name in ("auto_map", "custom_pipelines"):
            config.pop(name, None)
    if adapter.KEY in config:
        config[adapter.KEY] = adapter.read_settings(folder)
    return config


def _refuse_adapter(folder: Path) -> None:
    """Refuse (BadInput) a folder that holds an adapter in place of a model."""
    if not (file := folder / adapter.SETTINGS_FILE).exists():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise BadInput(
        f"'{folder}' holds an adapter, not a model; merge it into its base model "
        f"({base or 'which it does not name'}) first: load both with peft, and save what merge_and_unload() "
        "returns."
    )


def weight_patterns(folder: Path) -> list[str]:
    """Patterns of the weight files that the model in ``folder`` needs, from the index if it is there.

    Raises:
        BadInput: the index is damaged.
    """
    adapted = f"{adapter.KEY}/{adapter.WEIGHTS_FILE}"
    return [*(sorted(set(_read_index(folder).values())) or [WHOLE, "model-*-of-*.safetensors"]), adapted]


def _read_index(folder: Path) -> dict[str, str]:
    """Name of a tensor -> path of its file inside ``folder``; empty without an index that counts.

    Raises:
        BadInput: the index is damaged or names a file outside the folder.
    """
    index = folder / INDEX
    if (folder / WHOLE).exists() or not index.exists():
        return {}  # transformers looks for the whole file first, too; others may be copies in other layouts
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: Path(file).as_posix() for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{index} is not a safetensors index.") from None
    for file in files.values():
        if not is_inside(file):
            raise BadInput(f"{index} names '{file}', which is outside of the model folder.")
    return files


def _weight_files(folder: Path, index: dict[str, str]) -> list[Path]:
    """The safetensors files of a folder that count.

    Raises:
        BadInput: there are no such files, or one that the index lists is missing.
    """
    if index:
        files = sorted(folder / file for file in set(index.values()))
        for path in files:
            if not path.exists():
                raise BadInput(f"{path} is missing, though the index of '{folder}' lists it.")
        return files
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    others = ("adapter_model", "consolidated")  # an adapter, and weights under names of their own
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(others))
    if not files:
        _refuse_adapter(folder)
        if any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir()):
            raise BadInput(
                f"'{folder}' has only pickled weights, which can run code; convert them to safetensors."
            )
        raise BadInput(f"The model folder '{folder}' holds no *.safetensors weights.")
    return files


def _open(file: Path) -> Any:
    try:
        with file.open("rb") as opened:  # safetensors gives every reason as "No such file"
            pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from None
    if pointer:
        raise BadInput(
            f"{file} only points to the weights, which git-lfs has not fetched; run `git lfs pull`."
        )
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged or not a safetensors file ({error}).") from None
