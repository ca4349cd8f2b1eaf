"""An embedding whose table stays packed."""

from __future__ import annotations

import torch
from torch import nn

from compress.kernels.layers.linear import PackedLinear


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` over a packed table, for inference: only the rows of the given tokens are dequantized.

    The table is a `PackedLinear` whose bias is not used. So a head that is tied to the embedding can be the
    same module, and moving either to a device moves both.

    Args:
        table: [num_embeddings, embedding_dim].
        dtype: of the output. It changes when the module is cast to another dtype.
        embed_scale: a number in a tensor that the output is multiplied by (Gemma), or None.
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
        self.register_buffer("like", like, persistent=False)  # empty: it only remembers the dtype

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def embedding_dim(self) -> int:
        return self.table.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> their rows [..., embedding_dim], dequantized in float32 and then rounded."""
        rows = self.table.dequantize_rows(input.reshape(-1))
        rows = rows.to(self.like.dtype).view(*input.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)
