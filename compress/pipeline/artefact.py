"""Writing the artefact: a Hugging Face model folder with its recipe."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from compress.engine.config import UNLEARNING, config_of
from compress.engine.pruned_config import modeling_source
from compress.errors import BadInput
from compress.storage.adapter import write_config
from compress.storage.checkpoint import Checkpoint
from compress.storage.companions import PRUNED_FILE, copy_companions
from compress.storage.lineage import LINEAGE, RECIPE
from compress.storage.writer import write_weights


def write_model(checkpoint: Checkpoint, source: Path, folder: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Write weights, config and recipe into ``folder``, with the tokenizer files and the like of ``source``.

    Returns:
        File name -> sha256, for every file that decides what the model computes.
    """
    folder.mkdir(parents=True)
    copy_companions(source, folder)
    write_config(checkpoint.config, folder)
    if "pruned" in checkpoint.config and UNLEARNING not in checkpoint.config:
        (folder / PRUNED_FILE).write_text(modeling_source(config_of(checkpoint)), encoding="utf-8")
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    hashes = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != RECIPE
    }
    return hashes | write_weights(checkpoint, folder)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or that is not empty.

    Raises:
        BadInput: the folder is not empty and ``overwrite`` is off, it holds something other than a model, or
            it or its parent is a file.
    """
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not there.is_dir():
        raise BadInput(f"The output '{folder}' cannot be created, because '{there}' is not a folder.")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadInput(f"The output '{folder}' is not a folder.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise BadInput(f"The output folder '{folder}' is not empty; use --overwrite or another -o.")
    ours = folder / "config.json", folder / LINEAGE  # a folder with a .gguf file has no config.json
    if folder.exists() and any(folder.iterdir()) and not any(file.exists() for file in ours):
        raise BadInput(
            f"The output folder '{folder}' holds something other than a model, which --overwrite does "
            "not remove; use another -o."
        )
