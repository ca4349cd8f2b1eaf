"""Low-bit codes in 32-bit words, bit for bit as the checkpoint formats store them.

Both formats store a dense little-endian bit stream: code i occupies bits [i·b, (i+1)·b), and word w holds
bits [32w, 32w+32). So 3-bit codes straddle words (code 10 has two bits in word 0 and one in word 1). The
formats differ only in the orientation of the stream:

- compressed-tensors ``weight_packed`` [out, ceil(in·b/32)]: the stream of an output row lies along the row.
- GPTQ ``qweight`` [in·b/32, out]: the same stream is a column. ``qzeros`` [groups, out·b/32]: each group has
  a stream along the output axis.

To unpack, a run of codes that fills whole bytes (see `_Run`) is put into an integer that has 8 bits for each
of its codes. Then its halves are moved apart until every code lies in a byte of its own. To pack, they are
moved together. The host is assumed to be little-endian.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 5, 6, 7, 8)
"""The widths of codes."""


class _Step(NamedTuple):
    """A step that moves the upper halves of parts of a run apart from the lower halves.

    Attributes:
        shift: how far they move.
        together: the bits of the upper halves before.
        apart: these bits after.
    """

    shift: int
    together: int
    apart: int


class _Run(NamedTuple):
    """The shortest run of codes that fills whole bytes: 8 codes in 3 bytes at 3 bits, 4 codes in 3 at 6 bits.

    Attributes:
        codes: how many codes it has.
        nbytes: how many bytes they fill in the stream.
        integer: the dtype that has 8 bits for each of the codes.
        steps: what brings each of the codes into a byte of its own.
    """

    codes: int
    nbytes: int
    integer: torch.dtype
    steps: list[_Step]


@cache
def _run(bits: int) -> _Run:
    if bits not in BITS:
        raise ValueError(f"Codes of {bits} bits cannot be packed; those of {BITS[0]} to {BITS[-1]} bits can.")
    codes = 8 // gcd(8, bits)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[codes]
    steps, half = [], codes // 2  # codes in half a part
    while half:
        shift, upper = half * (8 - bits), (1 << half * bits) - 1 << half * bits
        together = sum(upper << start * 8 for start in range(0, codes, 2 * half))
        steps.append(_Step(shift, together, together << shift))
        half //= 2
    return _Run(codes, codes * bits // 8, integer, steps)


def packed_width(count: int, bits: int) -> int:
    """The number of 32-bit words that hold ``count`` codes of ``bits`` bits."""
    return (count * bits + 31) // 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 [rows, count], each below 2^bits.
        bits: 2 to 8.

    Returns:
        int32 [rows, ceil(count·bits/32)]; the bits after the last code are 0.
    """
    run, (rows, count) = _run(bits), codes.shape
    # Flat, because "contiguous" tensors with an axis of length 1 may have strides that forbid such a view.
    runs = F.pad(codes, (0, -count % 32)).reshape(-1).view(run.integer)
    for shift, _, apart in reversed(run.steps):
        # x 2^shift - x (2^shift - 1) = x: the upper halves come down.
        runs = runs.sub((runs & apart) >> shift, alpha=(1 << shift) - 1)
    stream = runs.view(torch.uint8).view(-1, run.codes)[:, : run.nbytes].contiguous()
    return stream.view(-1).view(torch.int32).view(rows, -1)[:, : packed_width(count, bits)].contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of every row: the inverse of `pack`.

    Args:
        words: int32 [rows, ceil(count·bits/32)].
        bits: 2 to 8.
        count: codes in a row.

    Returns:
        uint8 [rows, count].
    """
    run, (rows, width) = _run(bits), words.shape
    if run.nbytes == 1:
        runs = words.reshape(-1).view(torch.uint8).to(run.integer)
    else:
        stream = F.pad(words, (0, -width % run.nbytes)).reshape(-1).view(torch.uint8)
        runs = F.pad(stream.view(-1, run.nbytes), (0, run.codes - run.nbytes)).view(run.integer)
    for shift, together, _ in run.steps:
        runs.add_(runs & together, alpha=(1 << shift) - 1)  # x + x (2^shift - 1) = x 2^shift
    return runs.view(torch.uint8).view(rows, -1)[:, :count]


def pack_gptq_zeros(zeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """Pack zero points as the ``qzeros`` of GPTQ.

    Args:
        zeros: uint8 [out, groups], each below 2^bits.
        bits: 2, 3, 4 or 8.
        version: 1 stores z − 1, 2 stores z (``checkpoint_format: gptq_v2``).

    Returns:
        int32 [groups, out·bits/32].

    Raises:
        ValueError: a zero point is 0 in version 1. There is no z − 1 for it; old writers let the borrow run
            through the other zero points of the word, which no reader can undo.
    """
    if version == 1:
        if bool((zeros == 0).any()):
            raise ValueError("GPTQ version 1 cannot store a zero point of 0; use version 2.")
        zeros = zeros - 1
    return pack(zeros.t(), bits)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int, count: int, version: int) -> torch.Tensor:
    """The inverse of `pack_gptq_zeros`.

    Version 1 is read like GPTQModel, its maintained writer, reads it: field by field at 3 bits, and otherwise
    with arithmetic on whole words, where a carry undoes each borrow. So zero points of 0 come back from files
    that GPTQModel wrote.

    Returns:
        uint8 [count, groups].
    """
    if version == 1 and bits != 3:
        qzeros = qzeros + pack(torch.ones(1, 32, dtype=torch.uint8), bits)[0, 0].to(qzeros.device)
    zeros = unpack(qzeros, bits, count)
    if version == 1 and bits == 3:
        zeros = (zeros + 1) & 7
    return zeros.t().contiguous()


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Pack signs along the last axis, one bit each, the most significant bit first.

    Args:
        signs: bool [..., count], True for +1.

    Returns:
        uint8 [..., ceil(count/8)]; the bits after the last sign are 0.
    """
    stream = F.pad(signs.to(torch.uint8), (0, -signs.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=signs.device)
    return (stream * places).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_signs`.

    Args:
        packed: uint8 [..., ceil(count/8)].
        count: signs in a row.

    Returns:
        float32 [..., count], +1 or −1.
    """
    # One look-up in a table of all bytes gives eight signs.
    table = _signs_of_bytes(packed.device).index_select(0, packed.reshape(-1).int())
    return table.view(*packed.shape[:-1], -1)[..., :count]


@cache
def _signs_of_bytes(device: torch.device) -> torch.Tensor:
    """The signs in every byte, float32 [256, 8]."""
    numbers = torch.arange(256, device=device)[:, None]
    places = torch.arange(7, -1, -1, device=device)
    return ((numbers >> places) & 1).float() * 2 - 1
