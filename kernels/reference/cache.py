"""Attention over keys and values in codes, in plain torch (see `compress.kernels.cache_ops`)."""

from __future__ import annotations

import torch

from compress.kernels.codes import minmax
from compress.kernels.codes.packing import pack, packed_width, unpack


def kv_quantize(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as `compress.kernels.cache_ops.kv_quantize`."""
    codes, scales = minmax.quantize(vectors, bits)
    batch, tokens, groups, width = vectors.shape
    rows = (codes + 2 ** (bits - 1)).to(torch.uint8).reshape(batch * tokens, groups * width)
    return pack(rows, bits).view(batch, tokens, packed_width(groups * width, bits)), scales


def dequantize(packed: torch.Tensor, scales: torch.Tensor, heads: int, width: int, bits: int) -> torch.Tensor:
    """The vectors of all tokens and heads: float32 [B, T, heads, width].

    Args:
        packed, scales: as `kv_quantize` gives them.
        heads, width: of the vectors of a token.
        bits: of a code.
    """
    rows = unpack(packed.flatten(0, 1), bits, heads * width).view(*scales.shape[:3], -1)
    vectors = (rows.float() - 2 ** (bits - 1)) * scales
    return vectors.reshape(*scales.shape[:2], heads, width)


def rotated(vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of vectors [B, T, heads, width], where the halves of the first values are pairs.

    Args:
        vectors: see above.
        cosines, sines: [B or 1, T, as many of the first values as are rotated].
    """
    cosines, sines = cosines.unsqueeze(2), sines.unsqueeze(2)
    turned, rest = vectors.split([cosines.shape[-1], vectors.shape[-1] - cosines.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cosines + torch.cat([-second, first], dim=-1) * sines, rest], dim=-1)


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
    """Arguments and result as `compress.kernels.cache_ops.kv_attention`."""
    _, all_heads, queries, width = query.shape
    found = dequantize(keys, key_scales, heads, width, bits)
    if cosines is not None and sines is not None:
        found = rotated(found, cosines.float(), sines.float())
    wide = [
        states.transpose(1, 2).repeat_interleave(all_heads // heads, dim=1)
        for states in (found, dequantize(values, value_scales, heads, width, bits))
    ]
    scores = (query.float() @ wide[0].transpose(2, 3)) * scaling
    tokens = keys.shape[1]
    if mask is None:
        last = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
        scores = scores.masked_fill(torch.arange(tokens, device=query.device) > last, -torch.inf)
    else:
        scores = scores + added(mask)
    blind = scores.amax(-1, keepdim=True) == -torch.inf  # padding, of which softmax would make NaN
    shares = scores.softmax(-1).masked_fill(blind, 0)
    return (shares @ wide[1]).transpose(1, 2).contiguous().to(query.dtype)


def added(mask: torch.Tensor) -> torch.Tensor:
    """A mask as float32 that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
