"""An embedding whose table stays packed."""

from __future__ import annotations

import torch
from torch import nn

from compress.kernels.layers.linear import PackedLinear
from compress.kernels.reference.ops import dequantize


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` over a packed table, for inference: only the rows asked for are dequantized.

    The table is a `PackedLinear` without use for its bias, so a head that is tied to the embedding can be the
    very same module, and both move together.

    Args:
        table: [num_embeddings, embedding_dim].
        dtype: of the output; it follows the module when that is moved to another one.
        embed_scale: what the output is multiplied with, a number in a tensor (Gemma); None: nothing.
    """

    embed_scale: torch.Tensor | None
    like: torch.Tensor

    def __init__(
        self,
        table: PackedLinear,
        dtype: torch.dtype = torch.float32,
        embed_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        like = torch.empty(0, dtype=dtype, device=table.packed.device)
        self.register_buffer("like", like, persistent=False)  # of no size: it remembers the dtype

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def embedding_dim(self) -> int:
        return self.table.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> their rows [..., embedding_dim], dequantized in float32 and then rounded."""
        table, ids = self.table, input.reshape(-1)
        zeros = None if table.zeros is None else table.zeros[ids]
        rows = dequantize(table.packed[ids], table.scales[ids], zeros, table.bits, table.in_features)
        rows = rows.to(self.like.dtype).view(*input.shape, table.in_features)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)
