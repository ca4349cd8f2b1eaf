"""A model to be asked: one of this tool's, or any other that transformers can load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.engine.loading import load
from compress.engine.opening import open_checkpoint
from compress.evaluation.harness.cache import digest
from compress.kernels.ops import backend_of
from compress.storage.checkpoint import Checkpoint
from compress.system.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
"""The files of a folder that make tokens of a text, or text of tokens."""


@dataclass(frozen=True)
class Subject:
    """A model folder, and how it is run.

    Attributes:
        name: for people.
        folder: where it is.
        device: where to run it.
        kernel: what multiplies packed weights, as in ``compress.load``.
        memory: the largest size of a model that is stored in blocks.
        dtype: of activations; None takes float32 on a CPU, and elsewhere what is stored.
    """

    name: str
    folder: Path
    device: str = "cpu"
    kernel: str = "auto"
    memory: str | int | None = None
    dtype: str | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The model as this tool reads it; None if it cannot."""
        return open_checkpoint(self.folder)

    @cached_property
    def sha256(self) -> str:
        assert self.checkpoint is not None
        return self.checkpoint.sha256

    @property
    def computes_in(self) -> str | None:
        """The dtype of activations; None if it is the stored one."""
        return self.dtype or ("float32" if torch.device(self.device).type == "cpu" else None)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the model's answers depend on, beside the questions."""
        words = sorted(
            {file for pattern in (*WORDS, "generation_config.json") for file in self.folder.glob(pattern)}
        )
        return {
            "model": self.sha256,
            "words": digest([[file.name, file_sha256(file)] for file in words if file.is_file()]),
            "memory": self.memory,
            "device": torch.device(self.device).type,
            "kernel": backend_of(self.device),
            "dtype": self.computes_in,
        }

    def load(self) -> PreTrainedModel:
        """The model, ready to be asked."""
        return load(self.folder, self.device, self.computes_in, self.memory, kernel=self.kernel)
