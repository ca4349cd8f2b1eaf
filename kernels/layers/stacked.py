"""Linear layers whose weight is a stack of blocks: any number of them from the bottom up makes a weight.

Each block has memory of its own, so that a running model can be given more blocks, or lose the last ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Self, cast

import torch
from torch import nn

from compress.kernels.codes.packing import unpack_signs
from compress.kernels.layers.base import LowBitLinear, restore_dtypes


class StackBlock(nn.Module):
    """One block of a stack: its tensors, by the names of its parts.

    They keep their dtypes when the module is cast to another dtype, because rounding them again would change
    the weight. They are not part of the state dict.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def part(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        return self.get_buffer(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        restore_dtypes(self, before)
        return self


class StackedLinear(LowBitLinear):
    """``nn.Linear`` whose weight is the sum of some blocks, for inference.

    A forward pass over T tokens dequantizes a few rows of the weight at once and never holds all of it dense.
    It reads the bytes of the blocks once, and costs 2 · T · out · in FLOPs besides what each block costs.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        blocks: at least the first.
        bias: [out], or None.

    Attributes:
        stored: the name of the linear in the checkpoint its blocks come from.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: Sequence[StackBlock],
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.blocks = nn.ModuleList(blocks)
        self.stored = ""

    @staticmethod
    @abstractmethod
    def parts(index: int) -> tuple[str, ...]:
        """The names of the tensors of block ``index``."""

    @classmethod
    def keys(cls, name: str, index: int) -> dict[str, str]:
        """The parts of block ``index`` of the linear ``name`` -> the full names of their tensors."""
        return {part: f"{name}.{part}_{index}" for part in cls.parts(index)}

    def to_storage(self, name: str) -> dict[str, torch.Tensor]:
        return {
            key: block.part(part)
            for index, block in enumerate(self.stack())
            for part, key in self.keys(name, index).items()
        }

    def from_storage(self, name: str, get: Callable[[str], torch.Tensor]) -> None:
        """Take over as many blocks as there are now."""
        for index, block in enumerate(self.stack()):
            for part, key in self.keys(name, index).items():
                setattr(block, part, get(key))

    @abstractmethod
    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        """Some rows of the sum of some consecutive blocks (of all by default): float32 [rows, in]."""

    def dense(self, blocks: slice = slice(None)) -> torch.Tensor:
        """The sum of some consecutive blocks (of all by default): float32 [out, in]."""
        slices = self.row_slices(self.stack()[0].part("signs").device)
        return torch.cat([self.dequantize_rows(rows, blocks) for rows in slices])

    def add(self, blocks: Iterable[StackBlock]) -> None:
        """Put blocks on top, on the device of the others."""
        device = self.stack()[0].part("signs").device
        self.blocks.extend(block.to(device) for block in blocks)

    def stack(self) -> list[StackBlock]:
        """The blocks from the bottom up."""
        return cast("list[StackBlock]", list(self.blocks))


class FactorStack(StackedLinear):
    """Ŵ = Σ_i S_i ⊙ (a_i b_i): the blocks of BitStack (see `compress.quantization.bitstack`).

    The parts of a block are ``signs`` uint8 [out, ceil(in/8)] (S), ``left`` float16 [out, k] (a) and
    ``right`` float16 [k, in] (b). Each block costs (2k + 2) · out · in FLOPs in a forward pass.
    """

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs", "left", "right")

    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        return reduce(torch.Tensor.add_, (self._product(block, rows) for block in self.stack()[blocks]))

    def _product(self, block: StackBlock, rows: slice) -> torch.Tensor:
        product = block.part("left")[rows].float() @ block.part("right").float()
        return product.mul_(unpack_signs(block.part("signs")[rows], self.in_features))


class PlaneStack(StackedLinear):
    """Ŵ = s ⊙ Σ_j 2^-j S_j: nested codes (see `compress.quantization.nested`).

    The parts of the first block are ``signs`` uint8 [2, out, ceil(in/8)] (S_0 and S_1) and ``scales`` float16
    [out, groups] (s). Every other block has only ``signs`` uint8 [out, ceil(in/8)] (S_j). Each plane costs
    2 · out · in FLOPs in a forward pass.
    """

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs",) if index else ("signs", "scales")

    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        stack = self.stack()
        scales = spread(stack[0].part("scales")[rows].float(), self.in_features)
        total = torch.zeros_like(scales)
        for index in range(len(stack))[blocks]:
            signs = stack[index].part("signs")
            if index == 0:
                major, minor = unpack_signs(signs[:, rows], self.in_features)
                total.add_(major).add_(minor, alpha=0.5)
            else:
                total.add_(unpack_signs(signs[rows], self.in_features), alpha=2.0 ** -(index + 1))
        return total.mul_(scales)


def spread(scales: torch.Tensor, width: int) -> torch.Tensor:
    """The scale of each weight [out, width] from those of the groups [out, groups].

    All groups but the last are ceil(width / groups) wide.
    """
    return scales.repeat_interleave(-(-width // scales.shape[1]), 1)[:, :width]
