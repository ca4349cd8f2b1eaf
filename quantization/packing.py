"""Low-bit codes in 32-bit words, bit for bit as the checkpoint formats store them.

Both formats are one dense little-endian bit stream: code i occupies bits [i·b, (i+1)·b), word w holds bits
[32w, 32w+32), so 3-bit codes straddle words (code 10 has two bits in word 0 and one in word 1). They differ
in orientation only:

- compressed-tensors ``weight_packed`` [out, ceil(in·b/32)]: the stream of an output row, lying along it;
- GPTQ ``qweight`` [in·b/32, out]: the same stream, standing; ``qzeros`` [groups, out·b/32]: a stream along
  the output axis for every group.

A stream repeats after lcm(8, b) bits, so packing works on blocks of whole bytes (2 codes in 1 byte at 4
bits, 8 codes in 3 bytes at 3 bits) with no operation wider than a byte. Hosts are taken to be little-endian.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 8)


def packed_width(count: int, bits: int) -> int:
    """Number of 32-bit words that hold ``count`` codes of ``bits`` bits."""
    return (count * bits + 31) // 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 [rows, count], each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [rows, ceil(count·bits/32)]; the bits after the last code are 0.
    """
    rows, count = codes.shape
    block, width = _block(bits)
    padded = F.pad(codes, (0, -count % 32)).view(rows, -1, block)
    if width == block:
        stream = padded
    else:
        stream = torch.zeros(*padded.shape[:2], width, dtype=torch.uint8, device=codes.device)
        for index in range(block):
            byte, shift = divmod(index * bits, 8)
            stream[..., byte] |= padded[..., index] << shift
            if shift + bits > 8:
                stream[..., byte + 1] |= padded[..., index] >> (8 - shift)
    words = stream.view(rows, -1).view(torch.int32)
    return words[:, : packed_width(count, bits)].contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of every row: the inverse of `pack`.

    Args:
        words: int32 [rows, ceil(count·bits/32)].
        bits: 2, 3, 4 or 8.
        count: codes in a row.

    Returns:
        uint8 [rows, count].
    """
    rows, width_in_words = words.shape
    block, width = _block(bits)
    if bits == 3:
        words = F.pad(words, (0, -width_in_words % 3))
    stream = words.contiguous().view(torch.uint8).view(rows, -1, width)
    if width == block:
        return stream.view(rows, -1)[:, :count]
    codes = torch.empty(*stream.shape[:2], block, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for index in range(block):
        byte, shift = divmod(index * bits, 8)
        target = codes[..., index]
        if shift + bits > 8:
            torch.bitwise_or(stream[..., byte] >> shift, stream[..., byte + 1] << (8 - shift), out=target)
            target &= mask
        elif shift + bits == 8:
            torch.bitwise_right_shift(stream[..., byte], shift, out=target)
        elif shift == 0:
            torch.bitwise_and(stream[..., byte], mask, out=target)
        else:
            torch.bitwise_and(stream[..., byte] >> shift, mask, out=target)
    return codes.view(rows, -1)[:, :count]


def pack_gptq_zeros(zeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """GPTQ ``qzeros``.

    Args:
        zeros: uint8 [out, groups], each below 2^bits.
        bits: 2, 3, 4 or 8.
        version: 1 stores z − 1, 2 stores z (``checkpoint_format: gptq_v2``).

    Returns:
        int32 [groups, out·bits/32].

    Raises:
        ValueError: a zero point of 0 in version 1. It has no z − 1; old writers let the borrow run through
            the other zero points of the word, which no reader can undo.
    """
    if version == 1:
        if bool((zeros == 0).any()):
            raise ValueError("GPTQ version 1 cannot store a zero point of 0; use version 2.")
        zeros = zeros - 1
    return pack(zeros.t().contiguous(), bits)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int, count: int, version: int) -> torch.Tensor:
    """The inverse of `pack_gptq_zeros`.

    Version 1 is undone as GPTQModel, its maintained writer, does it: field by field at 3 bits, and with word
    arithmetic otherwise, so that zero points of 0 come back from files it wrote (a borrow is met by a carry).

    Returns:
        uint8 [count, groups].
    """
    if version == 1 and bits != 3:
        qzeros = qzeros + pack(torch.ones(1, 32, dtype=torch.uint8), bits)[0, 0].to(qzeros.device)
    zeros = unpack(qzeros, bits, count)
    if version == 1 and bits == 3:
        zeros = (zeros + 1) & 7
    return zeros.t().contiguous()


def _block(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of whole bytes."""
    if bits not in BITS:
        raise ValueError(f"Codes have 2, 3, 4 or 8 bits, not {bits}.")
    return 8 // gcd(8, bits), bits // gcd(8, bits)
