"""Writes safetensors files with one tensor in memory at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import DTYPE_NAMES, DTYPES, TensorInfo, own
from compress.system.files import atomic


def write_weights(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    """Write a checkpoint as Hugging Face shards, with one tensor in memory at once.

    The tensors of an adapter are written into a folder of their own.

    Args:
        checkpoint: what to write.
        folder: an existing folder. It gets model.safetensors, or numbered shards and their index.
        max_shard_bytes: size limit of a shard in bytes; a single larger tensor gets a shard of its own.

    Returns:
        File name -> sha256.
    """
    hashes: dict[str, str] = {}
    if adapted := {n: i for n, i in checkpoint.tensors.items() if adapter.is_adapter(n)}:
        keys = {f"{adapter.PREFIX}{name}": info for name, info in adapted.items()}
        (folder / adapter.KEY).mkdir(exist_ok=True)
        hashes[f"{adapter.KEY}/{adapter.WEIGHTS_FILE}"] = _write_file(
            keys,
            lambda key: checkpoint.read(key.removeprefix(adapter.PREFIX)),
            folder / adapter.KEY / adapter.WEIGHTS_FILE,
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

    Unlike with the writer of the safetensors library, tensors may share memory, and a full disk raises an
    ordinary OSError.
    """
    infos = {
        name: TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()
    }
    with atomic(path) as temporary:
        _write_file(infos, lambda name: own(tensors[name]), temporary)


def _write_file(infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor], path: Path) -> str:
    """Write a safetensors file tensor by tensor; the library's writer needs all tensors in memory at once.

    Returns:
        The sha256 of the file.
    """
    # Wide dtypes come first, as in the library, so that every tensor is aligned to its item size. Those of
    # one width keep their order, because that is the order in which the blocks of a stack are read.
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
            put(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
