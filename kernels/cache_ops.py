"""The operators on keys and values in few bits.

``torch.ops.compress.kv_quantize`` rounds the vectors of tokens, and ``kv_attention`` computes the attention
of a few new tokens to all cached ones. The native kernels of the CPU read codes of 4 and 8 bits, and make no
dense copy of them, and those of CUDA do so for all widths.
"""

from __future__ import annotations

import ctypes

import torch

from compress.kernels.codes.packing import packed_width
from compress.kernels.cpu import cache as cpu
from compress.kernels.cpu.library import library
from compress.kernels.cuda import cache as cuda_cache
from compress.kernels.cuda import library as cuda
from compress.kernels.ops import LIBRARY, expect
from compress.kernels.reference import cache as reference

BITS = (2, 3, 4, 8)
NATIVE_BITS = (4, 8)

LIBRARY.define("kv_quantize(Tensor vectors, int bits) -> (Tensor, Tensor)")
LIBRARY.define(
    "kv_attention(Tensor query, Tensor keys, Tensor key_scales, Tensor values, Tensor value_scales, "
    "Tensor? cosines, Tensor? sines, Tensor? mask, int heads, int bits, float scaling) -> Tensor"
)


def check_kv_quantize(vectors: torch.Tensor, bits: int) -> None:
    """Make sure that the arguments of `kv_quantize` fit together.

    Raises:
        ValueError: they do not.
    """
    if bits not in BITS:
        raise ValueError(f"There are no codes of {bits} bits for keys and values.")
    if vectors.dim() != 4 or not vectors.shape[-1] or not vectors.is_floating_point():
        raise ValueError(f"There are no vectors in {vectors.dtype} {tuple(vectors.shape)}.")


def check_kv_attention(
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
) -> None:
    """Make sure that the arguments of `kv_attention` fit together.

    Raises:
        ValueError: they do not.
    """
    if bits not in BITS:
        raise ValueError(f"There are no codes of {bits} bits for keys and values.")
    if query.dim() != 4 or not query.is_floating_point() or not query.shape[-1]:
        raise ValueError(f"There are no queries in {query.dtype} {tuple(query.shape)}.")
    batch, all_heads, queries, width = query.shape
    if heads < 1 or all_heads % heads:
        raise ValueError(f"{heads} heads of keys do not divide {all_heads} heads of queries.")
    tokens = keys.shape[1] if keys.dim() == 3 else 0
    if tokens < max(queries, 1):
        raise ValueError(f"{queries} new tokens are not among {tokens} cached ones.")
    for role, codes, scales in (("keys", keys, key_scales), ("values", values, value_scales)):
        expect(role, codes, (batch, tokens, packed_width(heads * width, bits)), torch.int32)
        per_token = heads if scales.dim() == 4 and scales.shape[2] == heads else 1
        expect(f"scales of {role}", scales, (batch, tokens, per_token, 1), torch.float32)
    if (cosines is None) != (sines is None):
        raise ValueError("Cosines and sines come together.")
    if cosines is not None:
        rotated = cosines.shape[-1]
        if rotated % 2 or rotated > width:
            raise ValueError(f"{rotated} of {width} values cannot be rotated in pairs.")
        shape = (batch if len(cosines) == batch else 1, tokens, rotated)
        expect("cosines", cosines, shape, torch.float32, torch.bfloat16, torch.float16, torch.float64)
        expect("sines", sines, shape, cosines.dtype)
    if mask is not None:
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, all_heads):
            raise ValueError(f"'mask' has the shape {tuple(mask.shape)}, which does not fit the queries.")
        expect("mask", mask, (*mask.shape[:2], queries, tokens), torch.bool, query.dtype, torch.float32)


@torch.library.register_fake("compress::kv_quantize", lib=LIBRARY)
def _kv_quantize_shape(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_kv_quantize(vectors, bits)
    batch, tokens, scales, width = vectors.shape
    packed = vectors.new_empty((batch, tokens, packed_width(scales * width, bits)), dtype=torch.int32)
    return packed, vectors.new_empty((batch, tokens, scales, 1), dtype=torch.float32)


@torch.library.register_fake("compress::kv_attention", lib=LIBRARY)
def _kv_attention_shape(query: torch.Tensor, *rest: object) -> torch.Tensor:
    check_kv_attention(query, *rest)  # type: ignore[arg-type]
    batch, heads, queries, width = query.shape
    return query.new_empty((batch, queries, heads, width))


def _kv_quantize_cpu(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_kv_quantize(vectors, bits)
    native = library() if bits in NATIVE_BITS else None
    return reference.kv_quantize(vectors, bits) if native is None else cpu.quantize(native, vectors, bits)


def _kv_attention_cpu(
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
    given = (query, keys, key_scales, values, value_scales, cosines, sines, mask, heads, bits, scaling)
    check_kv_attention(*given)
    native = library() if bits in NATIVE_BITS else None
    return reference.kv_attention(*given) if native is None else cpu.attention(native, *given)


def _kv_quantize_cuda(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_kv_quantize(vectors, bits)

    def call(native: ctypes.CDLL, stream: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        packed, scales, error = cuda_cache.quantize(native, vectors, bits, stream)
        return (packed, scales), error

    found = cuda.start((vectors,), call) if cuda_cache.can_quantize(vectors) else None
    return reference.kv_quantize(vectors, bits) if found is None else found


def _kv_attention_cuda(
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
    given = (query, keys, key_scales, values, value_scales, cosines, sines, mask, heads, bits, scaling)
    check_kv_attention(*given)
    found = None
    if cuda_cache.can_attend(query, heads):
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        found = cuda.start(
            given[:8], lambda native, stream: cuda_cache.attention(native, *given, stream, processors)
        )
    return reference.kv_attention(*given) if found is None else found


LIBRARY.impl("kv_quantize", reference.kv_quantize, "CompositeExplicitAutograd")
LIBRARY.impl("kv_quantize", _kv_quantize_cpu, "CPU")
LIBRARY.impl("kv_quantize", _kv_quantize_cuda, "CUDA")
LIBRARY.impl("kv_attention", reference.kv_attention, "CompositeExplicitAutograd")
LIBRARY.impl("kv_attention", _kv_attention_cpu, "CPU")
LIBRARY.impl("kv_attention", _kv_attention_cuda, "CUDA")


def kv_quantize(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the keys or values of tokens as `compress.kernels.codes.minmax.quantize` does.

    Args:
        vectors: floating point [B, T, scales per token, values per scale].
        bits: 2, 3, 4 or 8.

    Returns:
        The codes plus 2^(bits−1), packed as one row for each token, int32 [B, T, words]; and float32 scales
        [B, T, scales per token, 1].

    Raises:
        ValueError: the arguments do not fit together.
    """
    return torch.ops.compress.kv_quantize(vectors, bits)


def kv_attention(
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
    """Attention of a few new tokens over keys and values in codes, computed in float32.

    Args:
        query: [B, heads of queries, new tokens, width], floating point.
        keys, key_scales: of all T tokens, as `kv_quantize` gives them.
        values, value_scales: the same.
        cosines, sines: of the rotary embedding of the keys, [B or 1, T, how many of the first values are
            rotated], where halves make up pairs; None if the keys are not to be rotated.
        mask: [B or 1, heads or 1, new tokens, T]: True where a token is seen, or what is added to scores.
            A token that sees none gets zeros, as from torch. None: the new tokens are the last of the T, and
            each sees itself and all before.
        heads: of keys and values; it divides those of the queries.
        bits: of a code.
        scaling: factor of the scores.

    Returns:
        [B, new tokens, heads of queries, width] in the dtype of ``query``.

    Raises:
        ValueError: the arguments do not fit together.
    """
    return torch.ops.compress.kv_attention(
        query, keys, key_scales, values, value_scales, cosines, sines, mask, heads, bits, scaling
    )
