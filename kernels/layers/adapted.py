"""A packed linear with a low-rank adapter beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from compress.kernels.layers.linear import PackedLinear

A, B = ".lora_A.weight", ".lora_B.weight"
"""What follows the name of a linear in the names of the tensors of its adapter."""


class AdaptedLinear(PackedLinear):
    """``x Ŵᵀ + bias + scaling · (x Aᵀ) Bᵀ`` with Ŵ packed, A [r, in] and B [out, r] in the dtype of x.

    It is created like a `PackedLinear`; `adapt` gives it its adapter, which counts in `weight_bytes`.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    def adapt(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        """Take over A [r, in], B [out, r] and the scaling."""
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.scaling = scaling

    def to_storage(self, name: str) -> dict[str, torch.Tensor]:
        return {**super().to_storage(name), f"{name}{A}": self.lora_A, f"{name}{B}": self.lora_B}

    def from_storage(self, name: str, get: Callable[[str], torch.Tensor]) -> None:
        super().from_storage(name, get)
        self.lora_A, self.lora_B = get(f"{name}{A}").to(self.lora_A), get(f"{name}{B}").to(self.lora_B)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        low_rank = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return torch.add(super().forward(input), low_rank, alpha=self.scaling)

    def details(self) -> dict[str, object]:
        return {**super().details(), "rank": len(self.lora_A)}
