"""Models of other tools that this one cannot read, but transformers can."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.engine.opening import open_checkpoint
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint, read_config, weight_patterns
from compress.system.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Foreign:
    """A model folder that only transformers reads.

    Args:
        folder: the model folder, with weights in safetensors.
        why: the reason why this tool cannot read it, for the message if transformers cannot either.
    """

    def __init__(self, folder: Path, why: BadInput) -> None:
        self.folder, self.why = folder, why
        self.files = sorted({file for each in weight_patterns(folder) for file in folder.glob(each)})
        if not self.files:
            raise why

    @cached_property
    def sha256(self) -> str:
        """Hash of config.json and of all weight files, independent of their paths."""
        files = [self.folder / "config.json", *self.files]
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()

    @cached_property
    def parameters(self) -> int:
        """Number of weights, however many bits each of them takes."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # of many types
            raise self._neither(error) from error
        return sum(parameter.numel() for parameter in model.parameters())

    def load(self, device: str = "cpu", dtype: str | None = None) -> PreTrainedModel:
        """The model as transformers loads it. Code and pickles in the folder are never run.

        Args:
            device: where to put it.
            dtype: of what is not quantized; None takes the one that is stored.

        Raises:
            BadInput: transformers cannot load it, or its files lack weights.
        """
        from transformers import AutoModelForCausalLM

        settings: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        except Exception as error:  # of many types
            raise self._neither(error) from error
        model, found = loaded
        if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise self._neither(f"its files lack {len(lacking)} weights, such as '{lacking[0]}'")
        ready: PreTrainedModel = model.eval()
        return ready

    def _neither(self, reason: object) -> BadInput:
        text = " ".join(str(reason).split())[:200].rstrip(".")
        return BadInput(f"{str(self.why).rstrip('.')}; transformers cannot load it either ({text}).")


def open_any(folder: Path) -> Checkpoint | Foreign:
    """A model folder, whoever wrote it.

    Raises:
        BadInput: it is not a model folder.
    """
    read_config(folder)
    try:
        return open_checkpoint(folder)
    except BadInput as error:
        return Foreign(folder, error)
