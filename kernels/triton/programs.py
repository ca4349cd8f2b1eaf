"""The Triton programs. Importing this module imports Triton.

A packed weight lies in canonical rows (see `compress.kernels.codes.packing`): the codes of a row are a dense
little-endian bit stream in 32-bit words. A tile of columns never reaches into a second group, so its scale
is one number for each row.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def codes_at(packed, row, column, words, live, bits: tl.constexpr):
    """The codes at some rows and columns of a weight, as int32 in the common shape of these.

    Args:
        packed: pointer to the first word.
        row, column: int64 tensors that broadcast.
        words: of a row.
        live: false where a column lies behind the last one.
        bits: of a code.
    """
    first = packed + row * words + column * bits // 32
    shift = (column * bits % 32).to(tl.uint32)
    code = tl.load(first, mask=live, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % bits != 0:  # then some codes reach into the next word
        over = live & (shift + bits > 32)
        above = tl.load(first + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        code |= tl.where(over, above << ((32 - shift) & 31), 0)
    return (code & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def tile_of(packed, row, start, width, words, bits: tl.constexpr, columns: tl.constexpr):
    """The codes of some rows [rows] in a tile of columns: int32 [rows, columns]."""
    words_of_tile: tl.constexpr = columns * bits // 32
    word = tl.arange(0, triton.next_power_of_2(words_of_tile))
    live = (word < words_of_tile) & (start * bits // 32 + word < words)
    at = row[:, None] * words + (start * bits // 32 + word)[None, :]
    found = tl.load(packed + at, mask=live[None, :], other=0).to(tl.uint32, bitcast=True)
    if 32 % bits == 0:
        shifts = (tl.arange(0, 32 // bits) * bits).to(tl.uint32)
        codes = (found[:, :, None] >> shifts[None, None, :]).reshape(row.shape[0], columns)
    else:
        bit = tl.arange(0, columns) * bits
        index, shift = tl.broadcast_to((bit // 32)[None, :], row.shape[0], columns), (bit % 32).to(tl.uint32)
        low = tl.gather(found, index, 1) >> shift
        high = tl.gather(found, tl.minimum(index + 1, words_of_tile - 1), 1) << ((32 - shift) & 31)
        codes = low | tl.where(shift + bits > 32, high, 0)
    return (codes & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def scale_at(scales, scale_table, at):
    """Scales in float32. Those in bytes are looked up in a table; of others, ``scale_table`` is None."""
    found = tl.load(scales + at)
    if scale_table is not None:
        found = tl.load(scale_table + found)
    return found.to(tl.float32)


@triton.jit
def linear(
    x,
    packed,
    scales,
    scale_table,
    zeros,
    table,
    output,
    rows,
    out,
    width,
    words,
    groups,
    group_size,
    tiles,
    bits: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    columns: tl.constexpr,
):
    """One tile of x Ŵᵀ, from some tiles of columns: the grid is (tiles of out, tiles of rows, splits).

    Args:
        x: [rows, width], float16 or bfloat16.
        packed: int32 [out, words].
        scales: [out, groups], in floating point or in bytes.
        scale_table: what the bytes stand for, float32 [256]; None for scales in floating point.
        zeros: uint8 [out, groups], or None.
        table: float32 [2^bits], or None.
        output: [splits, rows, out].
        tiles: of columns that each split adds up.
        columns: of a tile. They divide ``group_size``, or one group is a whole row.
    """
    row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    neuron = tl.program_id(0).to(tl.int64) * tile_out + tl.arange(0, tile_out)
    split = tl.program_id(2).to(tl.int64)
    # Rows behind the last one are read from the first: their results are not stored.
    weight_row = tl.where(neuron < out, neuron, 0)
    total = tl.zeros((tile_rows, tile_out), dtype=tl.float32)
    for step in range(tiles):
        # A tile behind the last column adds zeros: a branch here would keep Triton from loading ahead.
        start = (split * tiles + step) * columns
        column = start + tl.arange(0, columns)
        inputs = tl.load(
            x + row[:, None] * width + column[None, :],
            mask=(row < rows)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        codes = tile_of(packed, weight_row, start, width, words, bits, columns)
        group = weight_row * groups + tl.minimum(start // group_size, groups - 1)
        if table is not None:
            levels = tl.load(table + codes)
        elif zeros is not None:
            levels = (codes - tl.load(zeros + group).to(tl.int32)[:, None]).to(tl.float32)
        else:
            levels = (codes - (1 << (bits - 1))).to(tl.float32)
        # Differences of codes are exact in 16 bits; they are scaled when they have been multiplied.
        product = tl.dot(inputs, tl.trans(levels.to(inputs.dtype)))
        total += product * scale_at(scales, scale_table, group)[None, :]
    place = output + (split * rows + row[:, None]) * out + neuron[None, :]
    tl.store(place, total, mask=(row < rows)[:, None] & (neuron < out)[None, :])


@triton.jit
def embedding(
    numbers,
    packed,
    scales,
    scale_table,
    zeros,
    output,
    width,
    words,
    groups,
    group_size,
    bits: tl.constexpr,
    columns: tl.constexpr,
):
    """Some columns of a row of a table, dequantized: the grid is (rows that are asked for, tiles of columns).

    Args:
        numbers: int64 [rows], which rows.
        packed, scales, scale_table, zeros: as in `linear`.
        output: float32 [rows, width].
    """
    asked = tl.program_id(0).to(tl.int64)
    row = tl.load(numbers + asked)
    column = tl.program_id(1).to(tl.int64) * columns + tl.arange(0, columns)
    live = column < width
    group = row * groups + tl.where(live, column, 0) // group_size
    codes = codes_at(packed, row, column, words, live, bits)
    zero = 1 << (bits - 1) if zeros is None else tl.load(zeros + group).to(tl.int32)
    tl.store(
        output + asked * width + column, (codes - zero) * scale_at(scales, scale_table, group), mask=live
    )
