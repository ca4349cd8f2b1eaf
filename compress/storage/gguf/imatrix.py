"""Importance matrices of llama.cpp: the mean square of every input of every linear.

There are two kinds of files. The newer one is a GGUF file with the sums of squares and the numbers of tokens;
the older one, which ends in .dat, holds means for names in a row of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from compress.errors import BadInput
from compress.kernels.codes.gguf import TYPES
from compress.storage.gguf.reader import MAGIC, GGUFFile
from compress.storage.gguf.writer import Planned, write_gguf
from compress.system.files import atomic

SUMS, COUNTS = ".in_sum2", ".counts"
MOST_VALUES = 2**24


@dataclass(frozen=True)
class ImportanceMatrix:
    """Importances of linears.

    Attributes:
        values: name of a weight in a GGUF file -> mean square of its inputs, float32 [in].
        chunks: windows of text that were looked at.
        chunk_size: tokens of a window.
        dataset: what the text was.
    """

    values: dict[str, torch.Tensor]
    chunks: int = 1
    chunk_size: int = 512
    dataset: str = ""


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of either kind.

    Raises:
        BadInput: there is no such file, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
    except OSError as error:
        raise BadInput(f"The importance matrix '{path}' cannot be read: {error.strerror}.") from None
    found = _read_gguf(path) if is_gguf else _read_old(path)
    for name, values in found.values.items():
        if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
            raise BadInput(
                f"The importance matrix '{path}' holds negative or infinite values for '{name[:80]}'."
            )
    return found


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Write an importance matrix: the older kind if ``path`` ends in .dat, else the newer."""
    with atomic(path) as temporary:
        if path.suffix == ".dat":
            _write_old(matrix, temporary)
        else:
            _write_gguf(matrix, temporary)


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        raise BadInput(f"'{path}' is a GGUF file, but no importance matrix.")
    values = {}
    for sums in (name for name in file.tensors if name.endswith(SUMS)):
        name = sums.removesuffix(SUMS)
        if f"{name}{COUNTS}" not in file.tensors:
            raise BadInput(f"The importance matrix '{path}' does not say how many tokens '{name[:80]}' saw.")
        total, count = file.tensor(sums).flatten(), file.tensor(f"{name}{COUNTS}").flatten()
        if len(count) != 1:
            continue  # the experts of a mixture, which no model here has
        values[name] = total / count.clamp(min=1)
    chunks = file.metadata.get("imatrix.chunk_count", 1)
    size = file.metadata.get("imatrix.chunk_size", 512)
    datasets = file.metadata.get("imatrix.datasets") or [""]
    if not (isinstance(chunks, int) and isinstance(size, int) and isinstance(datasets, list)):
        raise BadInput(f"The importance matrix '{path}' does not say what text it was made on.")
    return ImportanceMatrix(values, chunks, size, str(datasets[0]))


def _write_gguf(matrix: ImportanceMatrix, path: Path) -> None:
    tokens = float(matrix.chunks * matrix.chunk_size)
    kind = TYPES["F32"]
    planned: dict[str, Planned] = {}
    for name, values in sorted(matrix.values.items()):
        total, count = values.float()[None] * tokens, torch.tensor([[tokens]])
        planned[f"{name}{SUMS}"] = Planned(kind, tuple(total.shape), partial(kind.encode, total))
        planned[f"{name}{COUNTS}"] = Planned(kind, (1, 1), partial(kind.encode, count))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [matrix.dataset],
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    write_gguf(path, "imatrix", metadata, planned)


def _read_old(path: Path) -> ImportanceMatrix:
    data = path.read_bytes()
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise BadInput(f"The importance matrix '{path}' is cut off.")
        (found,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(found)

    def take(count: int, most: int) -> bytes:
        nonlocal at
        if not 0 <= count <= most or at + count > len(data):
            raise BadInput(f"'{path}' is not an importance matrix, or is cut off.")
        found = data[at : at + count]
        at += count
        return found

    values = {}
    for _ in range(_checked(number(), path)):
        name = take(number(), 65_535).decode("utf-8", "replace")
        calls, count = number(), number()
        found = np.frombuffer(take(4 * count, 4 * MOST_VALUES), "<f4")
        values[name] = torch.from_numpy(found.copy()) / max(calls, 1)
    if not values:
        raise BadInput(f"The importance matrix '{path}' is empty.")
    chunks, dataset = 1, ""
    if at < len(data):
        chunks = max(1, number())
        dataset = take(number(), 65_535).decode("utf-8", "replace")
    return ImportanceMatrix(values, chunks, 512, dataset)


def _checked(count: int, path: Path) -> int:
    if not 0 < count <= 2**20:
        raise BadInput(f"'{path}' is not an importance matrix.")
    return count


def _write_old(matrix: ImportanceMatrix, path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(matrix.values)))
        for name, values in sorted(matrix.values.items()):
            text = name.encode()
            file.write(struct.pack("<i", len(text)) + text)
            file.write(struct.pack("<ii", matrix.chunks, len(values)))
            file.write((values.float() * matrix.chunks).numpy().astype("<f4").tobytes())
        text = matrix.dataset.encode()
        file.write(struct.pack("<ii", matrix.chunks, len(text)) + text)
