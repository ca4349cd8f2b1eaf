"""The layout that the kernels of all CPU paths read: strips of 16 rows, which lie next to each other.

A row of a strip is a lane of the vectors that multiply it. So a line of 64 bytes holds codes of 16 rows,
scales are vectors, and sums stay in their lanes. One layout serves all widths of vectors and types of
activations.

- Rows are filled up to a multiple of 16. The rows that are added have scales of 0.
- Each group of columns is filled up to a multiple of a chunk: 16 columns for codes of 2, 4 and 8 bits, 32 for
  the others. A group therefore starts with a line.
- A strip holds its groups one after the other, a group its chunks, and a chunk its planes. Codes of 2, 4 and
  8 bits are one plane. The others are cut into planes of 4, 2 and 1 bits, of which the widest has the low
  bits and comes first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1.
- A plane of b bits is a number of lines. Word r of a line, of four bytes, belongs to row r. Byte c of the
  word holds 8/b fields, and field j, from bit b·j, belongs to column 4·(8/b)·line + 4·j + c of the chunk.

So four consecutive columns are one field of a word, and a shift and a mask give them as four bytes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

STRIP = 16
"""Rows in a strip."""

BITS = range(2, 9)
"""Widths of a code."""

_LINE_WORD = 4  # bytes of one row in a line


def planes_of(bits: int) -> list[int]:
    """The widths of the planes of a code, the widest first: 7 -> 4, 2, 1."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def chunk_of(bits: int) -> int:
    """Columns in a chunk."""
    return 16 if len(planes_of(bits)) == 1 else 32


def strips_of(out: int) -> int:
    """The number of strips of so many rows."""
    return -(-out // STRIP)


def groups_of(width: int, group_size: int) -> int:
    """The number of groups in so many columns. The last may be shorter; −1 stands for a whole row."""
    return 1 if group_size == -1 else -(-width // group_size)


def strip_bytes(width: int, bits: int, group_size: int) -> int:
    """The bytes of a strip of so many columns."""
    return _padded_width(width, bits, group_size) * bits * STRIP // 8


def to_strips(codes: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Arrange codes in strips.

    Args:
        codes: [out, in], uint8 or float8_e4m3fn.
        bits: of a code, from 2 to 8.
        group_size: columns that share a scale; −1 for a whole row. It need not divide ``in``.

    Returns:
        [strips, bytes of a strip] in the dtype of ``codes``.
    """
    bytes_ = codes.contiguous().view(torch.uint8)
    out, width = bytes_.shape
    chunk, strips = chunk_of(bits), strips_of(out)
    padded = bytes_.new_zeros(strips * STRIP, _padded_width(width, bits, group_size))
    padded[:out, _columns(width, bits, group_size, codes.device)] = bytes_
    chunks = padded.view(strips, STRIP, -1, chunk)
    planes, shift = [], 0
    for plane in planes_of(bits):
        fields = (chunks >> shift & 2**plane - 1).view(*chunks.shape[:3], -1, 8 // plane, _LINE_WORD)
        words = (fields << _places(plane, codes.device)).sum(-2, dtype=torch.uint8)
        planes.append(words.permute(0, 2, 3, 1, 4).flatten(2))
        shift += plane
    return torch.cat(planes, dim=-1).view(strips, -1).view(codes.dtype)


def from_strips(packed: torch.Tensor, bits: int, group_size: int, out: int, width: int) -> torch.Tensor:
    """The inverse of `to_strips`.

    Args:
        packed: [strips, bytes of a strip], uint8 or float8_e4m3fn.
        bits, group_size: as in `to_strips`.
        out, width: the shape of the codes.

    Returns:
        [out, width] in the dtype of ``packed``.
    """
    strips, chunk = packed.shape[0], chunk_of(bits)
    chunks = packed.view(torch.uint8).view(strips, -1, chunk * bits * STRIP // 8)
    codes = chunks.new_zeros(strips, STRIP, chunks.shape[1], chunk)
    start, shift = 0, 0
    for plane in planes_of(bits):
        size = chunk * plane * STRIP // 8
        words = chunks[..., start : start + size].view(strips, chunks.shape[1], -1, STRIP, 1, _LINE_WORD)
        fields = words.permute(0, 3, 1, 2, 4, 5) >> _places(plane, packed.device) & 2**plane - 1
        codes |= fields.reshape(codes.shape) << shift
        start, shift = start + size, shift + plane
    rows = codes.view(strips * STRIP, -1)[:out]
    return rows[:, _columns(width, bits, group_size, packed.device)].contiguous().view(packed.dtype)


def rows_from_strips(
    packed: torch.Tensor, bits: int, group_size: int, width: int, rows: slice
) -> torch.Tensor:
    """Some consecutive rows of the codes that `to_strips` has arranged: [rows, width]."""
    start, stop, _ = rows.indices(len(packed) * STRIP)
    some = packed[start // STRIP : -(-stop // STRIP)]
    codes = from_strips(some, bits, group_size, len(some) * STRIP, width)
    return codes[start % STRIP :][: stop - start]


def groups_to_strips(values: torch.Tensor) -> torch.Tensor:
    """Arrange scales or zero points: [out, groups] -> [strips, groups, 16], with 0 in the added rows."""
    out, groups = values.shape
    padded = F.pad(values, (0, 0, 0, -out % STRIP))
    return padded.view(-1, STRIP, groups).transpose(1, 2).contiguous()


def groups_from_strips(values: torch.Tensor, out: int) -> torch.Tensor:
    """The inverse of `groups_to_strips`: [strips, groups, 16] -> [out, groups]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out]


def _padded(width: int, bits: int) -> int:
    return -(-width // chunk_of(bits)) * chunk_of(bits)


def _padded_width(width: int, bits: int, group_size: int) -> int:
    """Columns of a row once all groups are filled up."""
    last = groups_of(width, group_size) - 1
    return last * _padded(group_size, bits) + _padded(width - last * group_size, bits)


def _columns(width: int, bits: int, group_size: int, device: torch.device) -> torch.Tensor | slice:
    """Where the columns lie among those that fill up the groups."""
    if group_size == -1 or group_size % chunk_of(bits) == 0:
        return slice(width)
    columns = torch.arange(width, device=device)
    return columns // group_size * _padded(group_size, bits) + columns % group_size


def _places(plane: int, device: torch.device) -> torch.Tensor:
    """By how much the fields of a word are shifted: uint8 [fields, 1]."""
    return torch.arange(0, 8, plane, dtype=torch.uint8, device=device)[:, None]
