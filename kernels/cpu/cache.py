"""The native calls on keys and values in codes."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from compress.kernels.codes.packing import packed_width
from compress.kernels.reference.cache import added

_SIZES = (
    *("batch", "heads", "key_heads", "queries", "tokens", "width", "stride", "key_scales", "value_scales"),
    *("rotated", "rotations", "mask_batch", "mask_heads", "bits"),
)
_POINTERS = (
    "keys",
    "values",
    "scales_of_keys",
    "scales_of_values",
    "cosines",
    "sines",
    "mask",
    "query",
    "output",
)


class Attention(ctypes.Structure):
    """``Attention`` of source/cache.cpp, which says what the fields mean."""

    _fields_ = [
        *((name, c_int64) for name in _SIZES),
        ("scaling", c_float),
        *((name, c_void_p) for name in _POINTERS),
    ]


def quantize(library: ctypes.CDLL, vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments, checked, and result as for `compress.kernels.cache_ops.kv_quantize`."""
    batch, tokens, scales, width = vectors.shape
    vectors = vectors.float().contiguous()
    words = packed_width(scales * width, bits)
    packed = torch.empty((batch, tokens, words), dtype=torch.int32)
    found = torch.empty((batch, tokens, scales, 1), dtype=torch.float32)
    function = library.compress_kv_quantize
    function.argtypes = (c_void_p, *[c_int64] * 4, c_int32, c_void_p, c_void_p)
    function.restype = None
    function(
        vectors.data_ptr(),
        batch * tokens,
        scales,
        width,
        4 * words,
        bits,
        packed.data_ptr(),
        found.data_ptr(),
    )
    return packed, found


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
) -> torch.Tensor:
    """Arguments, checked, and result as for `compress.kernels.cache_ops.kv_attention`."""
    batch, all_heads, queries, width = query.shape
    output = torch.empty((batch, queries, all_heads, width), dtype=torch.float32)
    mask = None if mask is None else added(mask)
    # The names keep copies alive until the call is over.
    tensors = {
        name: None if tensor is None else tensor.contiguous()
        for name, tensor in {
            "keys": keys,
            "values": values,
            "scales_of_keys": key_scales,
            "scales_of_values": value_scales,
            "cosines": None if cosines is None else cosines.float(),
            "sines": None if sines is None else sines.float(),
            "mask": mask,
            "query": query.float(),
            "output": output,
        }.items()
    }
    call = Attention(
        batch=batch,
        heads=all_heads,
        key_heads=heads,
        queries=queries,
        tokens=keys.shape[1],
        width=width,
        stride=4 * keys.shape[2],
        key_scales=key_scales.shape[2],
        value_scales=value_scales.shape[2],
        rotated=0 if cosines is None else cosines.shape[-1],
        rotations=0 if cosines is None else len(cosines),
        mask_batch=0 if mask is None else mask.shape[0],
        mask_heads=0 if mask is None else mask.shape[1],
        bits=bits,
        scaling=scaling,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    function = library.compress_kv_attention
    function.argtypes, function.restype = (c_void_p,), None
    function(ctypes.addressof(call))
    return output.to(query.dtype)
