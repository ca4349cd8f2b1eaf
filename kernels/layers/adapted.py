"""A packed linear with a low-rank adapter beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress.kernels.layers.linear import PackedLinear


class AdaptedLinear(PackedLinear):
    """``x Ŵᵀ + bias + scaling · (x Aᵀ) Bᵀ`` with Ŵ packed, A [r, in] and B [out, r] in the dtype of x.

    It is made like a `PackedLinear`, and gets its adapter by `adapt`.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    def adapt(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        """Take over A, B and the scaling."""
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.scaling = scaling

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        low_rank = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return torch.add(super().forward(input), low_rank, alpha=self.scaling)

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes, scales, zero points and the adapter take in memory."""
        return super().weight_bytes + self.lora_A.nbytes + self.lora_B.nbytes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_A)}"
