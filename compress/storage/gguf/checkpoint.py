"""The weights of a GGUF file as a checkpoint with the names of transformers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from compress.storage.gguf.architectures import converted, restored, tensor_names
from compress.storage.gguf.reader import GGUFFile
from compress.storage.tensors import TensorInfo
from compress.system.files import file_sha256


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A tensor as a GGUF file holds it: ``dtype`` is a type of ggml such as ``Q4_K``."""

    size: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size


class GGUFCheckpoint(Checkpoint):
    """Weights of a GGUF file in float32; each is decoded when it is read.

    Args:
        file: of which the header has been read.
        config: the transformers config object of the model.
        values: config.json as a dict.
        names: the parameters of the model; by default those that have a tensor in the file.

    Raises:
        BadInput: the file lacks a tensor of the model, or has one of another shape.
    """

    def __init__(
        self, file: GGUFFile, config: Any, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.file, self._config = file, config
        self._theirs = tensor_names(config, list(shapes))
        for name, theirs in self._theirs.items():
            if theirs not in file.tensors:
                raise BadInput(f"'{file.path}' lacks the tensor '{theirs}' of a {config.model_type} model.")
            there, wanted = file.tensors[theirs].shape, torch.empty(shapes[name], device="meta")
            # The order of the rows is only known of a size that the file has room for.
            if math.prod(there) != wanted.numel() or there != tuple(converted(config, name, wanted).shape):
                raise BadInput(
                    f"'{file.path}' holds '{theirs}' in the shape {list(there)}, which "
                    "is not what its metadata say."
                )
        infos = {name: TensorInfo("F32", shapes[name]) for name in self._theirs}
        super().__init__(file.path, values, infos, {})

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: restored(self._config, name, self.file.tensor(self._theirs[name])) for name in names}

    @property
    def packed(self) -> dict[str, TensorInfo]:
        """The tensors as the file holds them, which `tensors` lists in float32."""
        found = {name: self.file.tensors[theirs] for name, theirs in self._theirs.items()}
        return {
            name: PackedInfo(there.kind.name, self.tensors[name].shape, there.nbytes)
            for name, there in found.items()
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the config and of the file."""
        text = json.dumps(self.config, sort_keys=True) + file_sha256(self.file.path)
        return hashlib.sha256(text.encode()).hexdigest()
