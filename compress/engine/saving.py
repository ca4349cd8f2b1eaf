"""``model.save_pretrained`` of a loaded model: its folder again, with the values that it has now."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.engine.at_inference import AtInference
from compress.engine.config import UNLEARNING, config_of
from compress.engine.pruned_config import PRUNED_FILE, mark_pruned, modeling_source
from compress.engine.weights import Weights
from compress.errors import BadInput
from compress.kernels.layers.base import CodedLinear
from compress.kernels.layers.stacked import StackedLinear
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.stacks import StackFormat, laid_out
from compress.storage.tensors import DTYPE_NAMES, TensorInfo, own
from compress.storage.writer import write_weights
from compress.system.memory import parse_memory

QUANTIZATION = "quantization_config"
"""The section of config.json that says how linears are packed."""


class Save:
    """``model.save_pretrained("copy")``: write a packed or pruned model as it was read, with today's values.

    The folder holds the packed tensors, config.json with its quantization section, the adapter, the modelling
    file of a pruned model, and the settings of generation; `compress.load` and every program that loads the
    original load it. A model in blocks is written with the blocks it has now. The methods of transformers
    that save, such as ``push_to_hub``, come through here. Files appear whole; weights of an earlier model in
    the folder are removed.

    Args:
        model: whose values are written. Its modules must stay those it has now.
        weights: of the checkpoint it was loaded from, which say how tensors are called there.
        whole: whether it is the model that was loaded, and not its part below the head.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights, whole: bool = True) -> None:
        self._model, self._weights, self._whole = model, weights, whole
        self._kinds = _kinds(model)

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **others: Any,
    ) -> None:
        """Arguments are those of ``PreTrainedModel.save_pretrained``.

        Args:
            save_directory: a folder, which is made if it is not there.
            is_main_process: whether to write anything.
            state_dict: values to write in place of the model's own, under the same names.
            push_to_hub: whether to upload the model as well, with the arguments of ``push_to_hub`` and
                ``repo_id`` (the name of the folder by default).
            max_shard_size: of a file, such as "5GB".
            others: may only have the value that transformers gives them by default.

        Raises:
            BadInput: an argument that cannot be followed, a ``state_dict`` of other tensors, or a model
                whose modules are not those it was loaded with.
        """
        if getattr(self._model, "_hf_peft_config_loaded", False):  # then transformers writes the adapter only
            PreTrainedModel.save_pretrained(self._model, save_directory, is_main_process, **others)
            return
        if not self._whole and UNLEARNING in self._weights.checkpoint.config:
            raise BadInput("What this model unlearns at inference needs its head; save the whole model.")
        if self._weights.checkpoint.config.get(QUANTIZATION) and not self._whole:
            raise BadInput(
                "The part of a packed model below its head cannot be saved alone, because config.json names "
                "the linears as in the whole model; save the whole model."
            )
        hub = _check_arguments(others, push_to_hub)
        _check_storable(self._model)
        tensors = self._tensors(state_dict)
        self._check_folder(Path(save_directory), tensors)
        if is_main_process:
            self._write(Path(save_directory), tensors, parse_memory(max_shard_size))
        if is_main_process and push_to_hub:
            self._model.push_to_hub(**{"repo_id": Path(save_directory).name, **hub})

    def _write(self, folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
        config = self._config()
        saved = _Saved(folder, config, tensors)
        with _replacing(folder) as new:
            write_weights(saved, new, max_shard_bytes)
            if "auto_map" in config:
                (new / PRUNED_FILE).write_text(modeling_source(config_of(saved)), encoding="utf-8")
            if self._model.can_generate():
                self._model.generation_config.save_pretrained(new)
            adapter.write_config(config, new)

    def _config(self) -> dict[str, Any]:
        """The content of config.json, with that of adapter_config.json in it."""
        config = deepcopy(self._model.config)
        config.dtype, config.architectures = self._model.dtype, [type(self._model).__name__]
        values = json.loads(config.to_json_string())
        if "pruned" in values:
            values = mark_pruned(values, config, values["pruned"])
        if (unlearning := AtInference.of(values)) is not None:
            values = unlearning.declared(values)
        settings = self._weights.checkpoint.config.get(adapter.KEY)
        return values if settings is None else {**values, adapter.KEY: settings}

    def _tensors(self, given: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What is written: name in the checkpoint -> tensor. Of tensors that are tied, the first."""
        self._check_modules()
        state = self._model.state_dict(keep_vars=True)
        if given is not None and (others := given.keys() ^ state.keys()):
            raise BadInput(
                f"The state_dict to save must have the model's own names; '{min(others)}' differs."
            )
        modules = list(self._model.named_modules(remove_duplicate=False))
        first = {module: name for name, module in reversed(modules)}
        tied = tuple(f"{name}." for name, module in modules if first[module] != name)
        names = {id(tensor): name for name, tensor in reversed(state.items()) if not name.startswith(tied)}
        values = state if given is None else given
        found = {self._weights.find(name) or name: values[name] for name in reversed(names.values())}
        quantization = getattr(self._model.config, QUANTIZATION, None)
        return laid_out(found, quantization) if quantization and StackFormat.find(quantization) else found

    def _check_folder(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        whole = self._weights.checkpoint
        stacked = self._weights.stacks is not None and whole.tensors.keys() - tensors.keys()
        if stacked and folder.resolve() == whole.folder.resolve():
            raise BadInput(
                f"Saving into '{folder}' would remove the blocks that this model does not hold now; save it "
                "elsewhere, or give it all blocks first with resize(None)."
            )

    def _check_modules(self) -> None:
        kinds = _kinds(self._model)
        for name in sorted(kinds.keys() | self._kinds.keys()):
            if kinds.get(name) != self._kinds.get(name):
                raise BadInput(
                    f"The module '{name}' is not the one the model was loaded with, so config.json would not "
                    "fit; save an adapter with the save_pretrained of its own (peft) model."
                )


class _Saved(Checkpoint):
    """A checkpoint of tensors in memory."""

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        infos = {n: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
        super().__init__(folder, config, infos, {})
        self._held = tensors

    def read(self, name: str) -> torch.Tensor:
        return own(self._held[name])


def _check_storable(model: nn.Module) -> None:
    """Refuse (BadInput) a model with a weight that was rounded at loading."""
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear) and module.storage is None:
            raise BadInput(
                f"'{name}' was rounded when this model was loaded, and no checkpoint format was chosen for "
                "it; load the model without head_bits to save it."
            )


def _kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Name -> class of every module, without the blocks of stacks, whose number may change."""
    stacks = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, StackedLinear))
    return {name: type(module) for name, module in model.named_modules() if not name.startswith(stacks)}


def _check_arguments(given: dict[str, Any], push_to_hub: bool) -> dict[str, Any]:
    """The arguments for ``push_to_hub`` among those given.

    Raises:
        BadInput: others are given that would have to change what is written.
    """
    known = inspect.signature(PreTrainedModel.save_pretrained).parameters
    uploading = {"repo_id", "token", *inspect.signature(PreTrainedModel.push_to_hub).parameters}
    hub = {name: value for name, value in given.items() if push_to_hub and name in uploading}
    for name, value in given.items():
        if name not in hub and not (name in known and value == known[name].default):
            raise BadInput(f"A packed or pruned model cannot be saved with {name}={value!r}; leave it out.")
    return hub


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """``with _replacing(folder) as new``: files written into ``new`` move to ``folder`` when the block ends.

    Weights that were there before are removed, because loaders would take them for parts of the new model.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"'{folder}' is a file; give a folder to save the model in.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        yield Path(name)
        files = [file for file in Path(name).rglob("*") if file.is_file()]
        before = {*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")}
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            target = folder / file.relative_to(name)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
            before.discard(target)
        for stale in before:
            stale.unlink()
