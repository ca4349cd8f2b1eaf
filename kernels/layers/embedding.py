"""An embedding whose table stays packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.kernels.layers.absent import AbsentWeight
from compress.kernels.layers.affine_linear import AffineLinear
from compress.kernels.layers.linear import PackedLinear


class PackedEmbedding(nn.Embedding):
    """``nn.Embedding`` over a packed table, for inference: only the rows of the given tokens are dequantized.

    The table is a linear whose bias is not used. So a head that is tied to the embedding can be the
    same module, and moving either to a device moves both.

    Args:
        table: [num_embeddings, embedding_dim].
        dtype: of the output. It changes when the module is cast to another dtype.
        embed_scale: a number in a tensor that the output is multiplied by (Gemma), or None.
    """

    embed_scale: torch.Tensor | None
    like: torch.Tensor
    padding_idx = max_norm = None
    norm_type, scale_grad_by_freq, sparse = 2.0, False, False

    def __init__(
        self,
        table: PackedLinear | AffineLinear,
        dtype: torch.dtype = torch.float32,
        embed_scale: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Embedding, which makes a dense table
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.table = table
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        like = torch.empty(0, dtype=dtype, device=table.packed.device)
        self.register_buffer("like", like, persistent=False)  # empty: it only remembers the dtype

        # In the state dict, the table has the names that it has in a checkpoint.
        self.register_state_dict_post_hook(_name_as_stored)
        self.register_load_state_dict_pre_hook(_name_as_held)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Stands for the dense table, for code that asks for its shape, dtype or device."""
        return AbsentWeight((self.num_embeddings, self.embedding_dim), self.like.dtype, self.table.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> their rows [..., embedding_dim], dequantized in float32 and then rounded."""
        rows = self.table.rows_of(input.reshape(-1))
        rows = rows.to(self.like.dtype).view(*input.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def _name_as_stored(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}table.")]:
        state_dict[key.replace(f"{prefix}table.", prefix, 1)] = state_dict.pop(key)


def _name_as_held(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[key.replace(prefix, f"{prefix}table.", 1)] = state_dict.pop(key)
