"""Reads GGUF files. Nothing in a file is trusted: every count and offset is checked against its size."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from compress.errors import BadInput
from compress.kernels.codes.gguf import TYPES, BlockType

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_AXES, LONGEST_KEY, DEFAULT_ALIGNMENT = 4, 65_535, 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a kind of value -> how `struct` calls it."""
STRING, ARRAY = 8, 9
DEEPEST = 4
"""Arrays inside of arrays that are read."""
NAMES = {kind.number: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        kind: its type.
        shape: [n], [out, in] or more axes, the last one contiguous.
        start: of its bytes in the file.
        nbytes: of it.
    """

    kind: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, of which only the header has been read.

    Attributes:
        path: of the file.
        metadata: key -> number, string, bool, or list of these.
        tensors: name -> where it is, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header of a file.

        Raises:
            BadInput: it is not a GGUF file, it is damaged, or has tensors of types that cannot be read here.
        """
        try:
            with path.open("rb") as file:
                return cls(path, *_Header(path, file).read())
        except OSError as error:
            raise BadInput(f"'{path}' cannot be read: {error.strerror}.") from None

    def blocks(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8 [rows, bytes of a row]."""
        found = self.tensors[name]
        data = torch.empty(found.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(found.start)
            if file.readinto(data.numpy().data) != found.nbytes:
                raise BadInput(f"'{self.path}' has become shorter while it was read.")
        return data.view(-1, found.kind.row_bytes(found.shape[-1]))

    def tensor(self, name: str) -> torch.Tensor:
        """The real numbers of a tensor, float32 in its shape."""
        found = self.tensors[name]
        return found.kind.decode(self.blocks(name)).view(found.shape)


class _Header:
    """Reads the header of an open file."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)

    def refuse(self, why: str) -> NoReturn:
        raise BadInput(f"'{self.path}' is not a sound GGUF file: {why}.")

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if self.take(4, "it is too short") != MAGIC:
            raise BadInput(f"'{self.path}' is not a GGUF file: it does not begin with 'GGUF'.")
        version = self.number("I")
        if version not in VERSIONS:
            old = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
            self.refuse(f"it is {old}, and only little-endian files of versions 2 and 3 can be read")
        tensors, values = self.number("Q"), self.number("Q")
        # The shortest tensor takes 8 + 1 + 4 + 8 + 4 + 8 bytes of it, and the shortest value 8 + 1 + 4 + 1.
        if tensors * 33 + values * 14 > self.size:
            self.refuse(f"it claims {tensors:,} tensors and {values:,} values, more than it has room for")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self.string(LONGEST_KEY)
            if key in metadata:
                self.refuse(f"it holds the value '{key}' twice")
            metadata[key] = self.value(self.number("I"))
        infos = [self.info() for _ in range(tensors)]
        return metadata, self.placed(infos, metadata)

    def take(self, count: int, why: str = "it ends in the middle of its header") -> bytes:
        if count > self.size - self.file.tell():
            self.refuse(why)
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            self.refuse(f"a name in it has {length:,} characters")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("a text in it is not UTF-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth == DEEPEST:
            self.refuse(f"it has a value of the unknown kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            code = NUMBERS[inner]
            data = self.take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", data))
        if count * 8 > self.size - self.file.tell():  # the shortest text, or inner array, takes 8 bytes
            self.refuse(f"it claims a list of {count:,} values, more than it has room for")
        read: Callable[[], Any] = self.string if inner == STRING else lambda: self.value(inner, depth + 1)
        return [read() for _ in range(count)]

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.string(LONGEST_KEY), self.number("I")
        if not 1 <= axes <= MOST_AXES:
            self.refuse(f"its tensor '{name[:80]}' has {axes:,} axes")
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        return name, shape, self.number("I"), self.number("Q")

    def placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, Stored]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            self.refuse(f"its alignment is {alignment!r}")
        begin = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, shape, number, offset in infos:
            shown = name[:80]
            if name in tensors:
                self.refuse(f"it holds the tensor '{shown}' twice")
            if number not in NAMES:
                raise BadInput(
                    f"'{self.path}' stores '{shown}' in the type {number} of ggml, which cannot be read here "
                    f"(there are {', '.join(TYPES)})."
                )
            kind = NAMES[number]
            if 0 in shape or not kind.fits(shape[-1]):
                self.refuse(
                    f"its tensor '{shown}' has the shape {list(shape)}, which {kind.name} cannot have"
                )
            nbytes = kind.row_bytes(shape[-1])
            for size in shape[:-1]:
                nbytes *= size
            if offset % alignment or begin + offset + nbytes > self.size:
                self.refuse(f"its tensor '{shown}' lies beyond the end of the file, or is cut off")
            tensors[name] = Stored(kind, shape, begin + offset, nbytes)
        return tensors
