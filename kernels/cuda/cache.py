"""Keys and values in codes on a CUDA device: the calls of ``source/cache.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p

import torch

from compress.kernels.codes.packing import packed_width
from compress.kernels.cuda.linear import TYPES
from compress.kernels.reference.cache import added

TILE = 64
"""Tokens that a block of `attention` takes at a time."""

ROWS = 8
"""The most rows of queries that a block takes; see ``attention_of``."""

MOST_WIDTH = 1024
"""The largest width of a head that a block has threads for."""

MOST_GROUPS = 12288
"""The most scales of a token that fit into the 48 KiB of shared memory that every kernel may have."""

_SIZES = (
    *("batch", "heads", "key_heads", "queries", "tokens", "width", "words", "key_scales", "value_scales"),
    *("rotated", "rotations", "mask_batch", "mask_heads", "bits", "splits", "tiles", "type", "rotation_type"),
)
_POINTERS = (
    *("keys", "values", "scales_of_keys", "scales_of_values", "cosines", "sines", "mask", "query", "output"),
    "partial",
)


class Attention(ctypes.Structure):
    """``Attention`` of source/cache.cu, which says what the fields mean."""

    _fields_ = [
        *((name, c_int32) for name in _SIZES),
        ("scaling", c_float),
        *((name, c_void_p) for name in _POINTERS),
    ]


def can_quantize(vectors: torch.Tensor) -> bool:
    """Whether the kernel takes these vectors [B, T, scales per token, values per scale]."""
    return vectors.shape[2] <= MOST_GROUPS and 0 < vectors.numel() < 2**31


def can_attend(query: torch.Tensor, heads: int) -> bool:
    """Whether the kernel takes these queries [B, heads of queries, new tokens, width]."""
    batch, all_heads, queries, width = query.shape
    row_tiles = heads * -(-(all_heads // heads * queries) // ROWS)
    return 0 < query.numel() < 2**31 and width <= MOST_WIDTH and row_tiles < 2**16 and batch < 2**16


def quantize(
    library: ctypes.CDLL, vectors: torch.Tensor, bits: int, stream: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Start `compress.kernels.cache_ops.kv_quantize`, whose checked arguments these are.

    Args:
        library: of source/cache.cu.
        vectors, bits: see there; `can_quantize` holds.
        stream: that the kernels run in, as a number.

    Returns:
        Codes and scales, and the error of the launch; 0 is none.
    """
    batch, tokens, groups, width = vectors.shape
    vectors = (vectors if vectors.dtype in TYPES else vectors.float()).contiguous()
    words = packed_width(groups * width, bits)
    packed = torch.empty((batch, tokens, words), dtype=torch.int32, device=vectors.device)
    scales = torch.empty((batch, tokens, groups, 1), dtype=torch.float32, device=vectors.device)
    function = library.compress_cuda_kv_quantize
    function.argtypes = (c_void_p, c_int, c_int64, *[c_int] * 4, *[c_void_p] * 3)
    function.restype = c_int
    sizes = (TYPES[vectors.dtype], batch * tokens, groups, width, words, bits)
    error = function(vectors.data_ptr(), *sizes, packed.data_ptr(), scales.data_ptr(), stream)
    return packed, scales, error


def splits_of(tokens: int, blocks: int, processors: int) -> tuple[int, int]:
    """How many parts the tokens are cut into, so that the device has two blocks for each processor.

    Args:
        tokens: all of them.
        blocks: what there are of blocks without splits.
        processors: of the device.

    Returns:
        Parts, and tiles of `TILE` tokens in each of them; no part is empty.
    """
    all_tiles = -(-tokens // TILE)
    wanted = min(all_tiles, max(1, 2 * processors // blocks))
    tiles = -(-all_tiles // wanted)
    return -(-all_tiles // tiles), tiles


def attention(
    library: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    key_scales: torch.Tensor,
    values: torch.Tensor,
    value_scales: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    mask: torch.Tensor | None,
    heads: int,
    bits: int,
    scaling: float,
    stream: int | None,
    processors: int,
) -> tuple[torch.Tensor, int]:
    """Start `compress.kernels.cache_ops.kv_attention`, whose checked arguments these are.

    Args:
        library: of source/cache.cu.
        query, ..., scaling: see there; `can_attend` holds.
        stream: that the kernels run in, as a number.
        processors: of the device.

    Returns:
        What is attended to, in the dtype of ``query``, and the error of the launch; 0 is none.
    """
    batch, all_heads, queries, width = query.shape
    dtype, device = query.dtype, query.device
    query = query if dtype in TYPES else query.float()
    if cosines is not None and sines is not None and cosines.dtype not in TYPES:
        cosines, sines = cosines.float(), sines.float()
    tokens = keys.shape[1]
    blocks = batch * heads * -(-(all_heads // heads * queries) // ROWS)
    splits, tiles = splits_of(tokens, blocks, processors)
    output = torch.empty((batch, queries, all_heads, width), dtype=query.dtype, device=device)
    partial = None
    if splits > 1:
        shape = (batch, queries, all_heads, splits, 2 + width)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
    mask = None if mask is None else added(mask)
    # The names keep copies alive until the kernels are in the stream, in whose order memory is used again.
    tensors = {
        name: None if tensor is None else tensor.contiguous()
        for name, tensor in {
            "keys": keys,
            "values": values,
            "scales_of_keys": key_scales,
            "scales_of_values": value_scales,
            "cosines": cosines,
            "sines": sines,
            "mask": mask,
            "query": query,
            "output": output,
            "partial": partial,
        }.items()
    }
    call = Attention(
        batch=batch,
        heads=all_heads,
        key_heads=heads,
        queries=queries,
        tokens=tokens,
        width=width,
        words=keys.shape[2],
        key_scales=key_scales.shape[2],
        value_scales=value_scales.shape[2],
        rotated=0 if cosines is None else cosines.shape[-1],
        rotations=0 if cosines is None else len(cosines),
        mask_batch=0 if mask is None else mask.shape[0],
        mask_heads=0 if mask is None else mask.shape[1],
        bits=bits,
        splits=splits,
        tiles=tiles,
        type=TYPES[query.dtype],
        rotation_type=0 if cosines is None else TYPES[cosines.dtype],
        scaling=scaling,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    function = library.compress_cuda_kv_attention
    function.argtypes, function.restype = (c_void_p, c_void_p), c_int
    error = function(ctypes.addressof(call), stream)
    return output.to(dtype), error
