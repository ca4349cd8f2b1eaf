"""A model to be asked, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.engine.loading import load
from compress.evaluation.foreign import Foreign
from compress.evaluation.harness.cache import digest
from compress.kernels.ops import REFERENCE, backend_of
from compress.storage.checkpoint import Checkpoint, read_config
from compress.storage.formats.stacks import STACKS
from compress.system.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = (
    *("tokenizer*", "*_tokens*.json", "vocab*", "merges.txt", "*.model", "tekken.json"),
    *("chat_template*", "generation_config.json"),
)
"""The files of a folder that make tokens of a text, text of tokens, and an answer of predictions."""


@dataclass(frozen=True)
class Subject:
    """A model folder, and how it is run.

    Attributes:
        name: for people.
        opened: the model.
        device: where to run it.
        kernel: what multiplies packed weights, as in ``compress.load``.
        memory: the largest size of a model that is stored in blocks.
        dtype: of activations; None takes float32 on a CPU, and elsewhere what is stored.
    """

    name: str
    opened: Checkpoint | Foreign
    device: str = "cpu"
    kernel: str = "auto"
    memory: str | int | None = None
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.opened.folder

    @property
    def computes_in(self) -> str | None:
        """The dtype of activations; None if it is the stored one."""
        return self.dtype or ("float32" if torch.device(self.device).type == "cpu" else None)

    @property
    def dtype_name(self) -> str | None:
        """The dtype of activations, as scorecards name it; None if config.json does not say it."""
        config = read_config(self.folder)
        stored = config.get("dtype") or config.get("torch_dtype")
        return self.computes_in or (str(stored) if stored else None)

    @cached_property
    def words(self) -> str:
        """Hash of the files of `WORDS`."""
        files = sorted({file for pattern in WORDS for file in self.folder.glob(pattern) if file.is_file()})
        return digest([[file.name, file_sha256(file)] for file in files])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the model's answers depend on, beside the questions."""
        return {
            "model": self.opened.sha256,
            "words": self.words,
            "memory": self.memory,
            "device": torch.device(self.device).type,
            "kernel": self._runs_on,
            "dtype": self.computes_in,
            "libraries": [version("torch"), version("transformers")],
        }

    @property
    def _runs_on(self) -> str:
        return "transformers" if isinstance(self.opened, Foreign) else backend_of(self.device)

    @property
    def kernel_name(self) -> str:
        """The kernel of the low-bit layers, as scorecards name it."""
        if isinstance(self.opened, Foreign):
            return self._runs_on
        quantization = self.opened.config.get("quantization_config")
        if quantization is None:
            return "torch"
        return REFERENCE if quantization.get("quant_method") in STACKS else self._runs_on

    def load(self) -> PreTrainedModel:
        """The model, ready to be asked."""
        if isinstance(self.opened, Foreign):
            return self.opened.load(self.device, self.computes_in)
        return load(self.folder, self.device, self.computes_in, self.memory, kernel=self.kernel)
