"""Open a model folder as its class sees it: tensors under the names of the class, and a config that tells the
truth about them.

Published files differ from the class that their config.json names. The prefix of the base model is missing
or in the way, norms have old names, a head is called tied though it is not, files hold more or fewer layers
than the config says, or scales of a cache. All of that is settled here, once, so that plans, methods and
written files use the names that transformers looks for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.anatomy import Anatomy, anatomy_of
from compress.engine.config import config_of
from compress.engine.key_values import KEY
from compress.engine.skeleton import skeleton
from compress.engine.weights import Weights
from compress.errors import BadInput
from compress.storage.adapter import is_adapter
from compress.storage.checkpoint import Checkpoint

log = logging.getLogger(__name__)

WRAPPERS = ("", "language_model.", "model.language_model.", "module.", "_orig_mod.")
"""What may stand before the names of a model that was saved as a part of another object: of a model for
images and text, of torch's data-parallel wrapper, or of a compiled model."""

CACHE_SCALES = re.compile(r"\.[qkv]_(scale|zero_point)$")
"""How the names of tensors end that compressed-tensors stores for a cache."""

OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
"""What the first checkpoints of BERT call the parameters of a LayerNorm."""


def open_checkpoint(folder: str | Path, dtype: str | None = None) -> Checkpoint:
    """Open a model folder, with the names of its class and a config that fits its tensors.

    Args:
        folder, dtype: as in `Checkpoint.open`.

    Raises:
        BadInput: as `Checkpoint.open`; or the architecture is not supported, or the files lack a tensor that
            config.json asks for, or hold one of another shape.
    """
    checkpoint = Checkpoint.open(folder, dtype)
    model = skeleton(config_of(checkpoint))
    anatomy = anatomy_of(model.config)
    _use_names_of(model, checkpoint)
    _leave_out_layers_beyond(anatomy, model.config.num_hidden_layers, checkpoint)
    _leave_out_cache_scheme(checkpoint)
    if _untie(model, checkpoint):
        model = skeleton(config_of(checkpoint))
    Weights(checkpoint, model, "cpu", torch.float32).check(model)
    return checkpoint


def _use_names_of(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Rename tensors to what the class calls them. Those that it does not have keep their names."""
    modules, anatomy = dict(model.named_modules()), anatomy_of(model.config)

    def known(name: str) -> bool:  # layers beyond those of the config are recognised, too
        return _module_of(name) in modules or anatomy.layer_index(name) >= 0

    renamed: dict[str, str] = {}
    for name in checkpoint.tensors:
        new = next(filter(known, _spellings(name, model)), name)
        if new in checkpoint.tensors:
            new = name  # the class's own name wins; what else would get it is a copy that nothing reads
        if new in renamed:
            raise BadInput(
                f"The files of '{checkpoint.folder}' hold '{new}' of {type(model).__name__} twice, as "
                f"'{renamed[new]}' and as '{name}'; remove one of them."
            )
        renamed[new] = name
    checkpoint.tensors = {new: checkpoint.tensors[old] for new, old in renamed.items()}
    checkpoint.sources = {new: checkpoint.sources[old] for new, old in renamed.items()}


def _spellings(name: str, model: PreTrainedModel) -> Iterator[str]:
    """The names that the tensor ``name`` may have in the class, the likeliest first."""
    base = f"{model.base_model_prefix}."
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            bare = _with_new_leaf(name.removeprefix(wrapper))
            yield from (bare, bare.removeprefix(base), base + bare)


def _with_new_leaf(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{OLD_LEAVES[leaf]}" if module.endswith("LayerNorm") and leaf in OLD_LEAVES else name


def _module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rsplit(".", 3 if is_adapter(name) else 1)[0]


def _leave_out_layers_beyond(anatomy: Anatomy, count: int, checkpoint: Checkpoint) -> None:
    """Take out the layers that the files hold beyond the number in config.json, which nothing reads."""
    extra = {name for name in checkpoint.tensors if anatomy.layer_index(name) >= count}
    if extra:
        log.warning(
            "The files of '%s' hold layers beyond the %d that config.json says; they are left out.",
            checkpoint.folder,
            count,
        )
        _leave_out(checkpoint, extra)


def _leave_out_cache_scheme(checkpoint: Checkpoint) -> None:
    """Take out the ``kv_cache_scheme`` of another tool and its scales, because nothing here follows them."""
    declared = checkpoint.config.get("quantization_config") or {}
    if declared.get("kv_cache_scheme") is None or KEY in checkpoint.config:
        return
    log.warning(
        "config.json of '%s' has a kv_cache_scheme of another tool, which is left out; keys and values are "
        "cached in full precision.",
        checkpoint.folder,
    )
    checkpoint.config["quantization_config"] = {**declared, "kv_cache_scheme": None}
    _leave_out(checkpoint, {name for name in checkpoint.tensors if CACHE_SCALES.search(name)})


def _leave_out(checkpoint: Checkpoint, names: set[str]) -> None:
    checkpoint.tensors = {k: v for k, v in checkpoint.tensors.items() if k not in names}
    checkpoint.sources = {k: v for k, v in checkpoint.sources.items() if k not in names}


def _untie(model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Say in the config that the head is not the embedding if both are in the files and differ.

    A head that is a copy of the embedding stays where it is. No weight is read where the files hold only one
    of the two.
    """
    tied = dict(_tied(model, checkpoint))
    both = [pair for pair in tied.items() if all(name in checkpoint for name in pair)]
    if all(_equal(checkpoint, *pair) for pair in both):
        return False
    log.warning(
        "config.json of '%s' says that head and embedding are one table, but the files hold two that differ; "
        "the model is taken as untied.",
        checkpoint.folder,
    )
    checkpoint.config["tie_word_embeddings"] = False
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in checkpoint and other in checkpoint:  # such as a bias that was one with another
            checkpoint.tensors[name] = checkpoint.tensors[other]
            checkpoint.sources[name] = checkpoint.sources[other]
    return True


def _tied(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The pairs of parameters that are one in the class, with the name that the files have for the head."""
    here = anatomy_of(model.config)
    there = here.located(checkpoint.tensors)
    for target, source in model.all_tied_weights_keys.items():
        alias = f"{there.head}.{target.removeprefix(f'{here.head}.')}"
        yield (alias if target.startswith(f"{here.head}.") else target), source


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.tensors[one].shape != checkpoint.tensors[other].shape:
        return False
    return torch.equal(checkpoint.read(one).float(), checkpoint.read(other).float())
