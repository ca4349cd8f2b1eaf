"""Writes GGUF files with one tensor in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.kernels.codes.gguf import BlockType
from compress.storage.gguf.package import gguf_package
from compress.system.files import file_sha256

ALIGNMENT = 32
"""Every tensor begins at a multiple of so many bytes."""


@dataclass(frozen=True)
class Planned:
    """A tensor of a GGUF file that is made when it is written.

    Attributes:
        kind: its type.
        shape: of the tensor, [n] or [out, in].
        make: gives its bytes, uint8 [out, bytes of a row]; [1, bytes] for a tensor with one axis.
    """

    kind: BlockType
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without what aligns the next tensor."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.kind.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Planned],
    progress: Callable[[float], None] = lambda share: None,
) -> str:
    """Write a GGUF file.

    Args:
        path: of the file, which must not exist. It is not written atomically.
        architecture: ``general.architecture``.
        metadata: key -> value. Ints are stored as uint32, floats as float32.
        tensors: name -> tensor, in the order of the file.
        progress: told the share that is written.

    Returns:
        The sha256 of the file.

    Raises:
        BadInput: the package gguf is not installed, or a weight does not fit its type.
        OSError: it cannot be written, such as on a full disk.
    """
    package = gguf_package()
    writer = package.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(package, writer, key, value)
        for name, tensor in tensors.items():
            raw = package.GGMLQuantizationType(tensor.kind.number)
            shape = (*tensor.shape[:-1], tensor.kind.row_bytes(tensor.shape[-1]))
            writer.add_tensor_info(name, shape, _uint8(), tensor.nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
        (file,) = writer.fout
        for tensor in tensors.values():
            # Its own method for tensors loses the reason of an error, such as a full disk.
            writer.write_padding(file, file.tell())
            file.write(tensor.make().contiguous().numpy().data)
            writer.write_padding(file, tensor.nbytes)
            done += tensor.nbytes
            progress(done / max(total, 1))
    finally:
        writer.close()
    return file_sha256(path)


def file_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Planned]) -> int:
    """About how many bytes the file takes: its tensors exactly, and its metadata within some per cent."""
    return (
        sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())
        + sum(len(name) + 48 for name in tensors)
        + sum(len(key) + 12 + _value_bytes(value) for key, value in metadata.items())
    )


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if not isinstance(value, list):
        return 4
    texts = bool(value) and isinstance(value[0], str)
    return 12 + (sum(8 + len(item.encode()) for item in value) if texts else 4 * len(value))


def _uint8() -> Any:
    import numpy

    return numpy.dtype("uint8")


def _add(package: Any, writer: Any, key: str, value: Any) -> None:
    kinds = package.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(key, value, kind)
