"""Linear layers whose weight is a stack of small blocks, of which any number from the bottom makes a weight.

Blocks are held apart, each in its own memory, so that a layer can be given more of them, or let the last ones
go, while the model runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from compress.kernels.codes.packing import unpack_signs
from compress.kernels.reference.ops import BLOCK


class Block(nn.Module):
    """The tensors of one block, by the name of the part. They keep their dtypes when the module is moved to
    another one, because rounding them again would change the weight, and are not part of the state dict."""

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.buffers())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Block:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, part in before.items():
            if self._buffers[name].dtype != part.dtype:
                self._buffers[name] = part.to(self._buffers[name].device)
        return self


class StackedLinear(nn.Module, ABC):
    """``nn.Linear`` whose weight is the sum of some blocks, for inference.

    A forward pass over T tokens makes the dense weight a few rows at a time and never holds all of it: it
    reads the bytes of its blocks once, and costs 2 · T · out · in FLOPs besides what each block does.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        blocks: at least the first.
        bias: [out], or None.

    Attributes:
        stored: the name of the linear in the checkpoint its blocks come from.
    """

    kernel: ClassVar[str] = "reference"
    """The backend that runs it."""
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, blocks: Sequence[Block], bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("bias", bias, persistent=False)
        self.stored = ""

    @staticmethod
    @abstractmethod
    def parts(index: int) -> tuple[str, ...]:
        """The names of the tensors of block ``index``."""

    @abstractmethod
    def rows(self, part: slice, blocks: slice = slice(None)) -> torch.Tensor:
        """Rows of the sum of some consecutive blocks, float32 [rows, in]."""

    def dense(self, blocks: slice = slice(None)) -> torch.Tensor:
        """The sum of some consecutive blocks, of all if not said: float32 [out, in]."""
        return torch.cat([self.rows(part, blocks) for part in self._row_slices()])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result = input.new_empty((*input.shape[:-1], self.out_features))
        for part in self._row_slices():
            bias = None if self.bias is None else self.bias[part].to(input.dtype)
            result[..., part] = F.linear(input, self.rows(part).to(input.dtype), bias)
        return result

    def _row_slices(self) -> list[slice]:
        on_cpu = self.blocks[0].signs.device.type == "cpu"
        step = max(1, BLOCK // self.in_features) if on_cpu else self.out_features
        return [slice(start, start + step) for start in range(0, self.out_features, step)]

    @property
    def weight_bytes(self) -> int:
        """Bytes that the blocks take in memory."""
        return sum(block.nbytes for block in self.blocks)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class FactorStack(StackedLinear):
    """Ŵ = Σ_i S_i ⊙ (a_i b_i): BitStack's blocks (see `compress.quantization.bitstack`).

    Parts of a block: ``signs`` uint8 [out, ceil(in/8)] (S), ``left`` float16 [out, k] (a) and ``right``
    float16 [k, in] (b). Each costs (2k + 2) · out · in FLOPs in a forward pass.
    """

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs", "left", "right")

    def rows(self, part: slice, blocks: slice = slice(None)) -> torch.Tensor:
        total = None
        for block in self.blocks[blocks]:
            product = block.left[part].float() @ block.right.float()
            product.mul_(unpack_signs(block.signs[part], self.in_features))
            total = product if total is None else total.add_(product)
        return total


class PlaneStack(StackedLinear):
    """Ŵ = s ⊙ Σ_j 2^-j S_j: nested codes (see `compress.quantization.nested`).

    Parts of the first block: ``signs`` uint8 [2, out, ceil(in/8)] (S_0 and S_1) and ``scales`` float16
    [out, groups] (s); of each other one: ``signs`` uint8 [out, ceil(in/8)] (S_j). Each plane costs
    2 · out · in FLOPs in a forward pass.
    """

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs",) if index else ("signs", "scales")

    def rows(self, part: slice, blocks: slice = slice(None)) -> torch.Tensor:
        scales = spread(self.blocks[0].scales[part].float(), self.in_features)
        total = torch.zeros_like(scales)
        for index in range(len(self.blocks))[blocks]:
            signs = self.blocks[index].signs
            if index == 0:
                major, minor = unpack_signs(signs[:, part], self.in_features)
                total.add_(major).add_(minor, alpha=0.5)
            else:
                total.add_(unpack_signs(signs[part], self.in_features), alpha=2.0 ** -(index + 1))
        return total.mul_(scales)


def spread(scales: torch.Tensor, width: int) -> torch.Tensor:
    """The scale of each weight, [out, width], from those of groups, [out, groups], of which all but the last
    are ceil(width / groups) wide."""
    return scales.repeat_interleave(-(-width // scales.shape[1]), 1)[:, :width]
