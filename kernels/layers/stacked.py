"""Linear layers whose weight is a stack of blocks: any number of them from the bottom up makes a weight.

Each block has memory of its own, so that a running model can be given more blocks, or lose the last ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self, cast

import torch
from torch import nn

from compress.kernels.layers.base import LowBitLinear, restore_dtypes
from compress.kernels.reference.stacks import dequantize_factors, dequantize_planes, spread
from compress.kernels.stack_ops import backend_of_stacks, factor_linear, plane_linear

__all__ = ["FactorStack", "PlaneStack", "StackBlock", "StackedLinear", "spread"]


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

    The native kernels multiply straight from the bits of the blocks. Plain torch dequantizes a few rows of
    the weight at once and never holds all of it dense.

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
                given, mine = get(key), block.part(part)
                if given.shape != mine.shape:
                    raise ValueError(f"'{key}' has the shape {(*given.shape,)}, not {(*mine.shape,)}.")
                setattr(block, part, given)

    @abstractmethod
    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        """Some rows of the sum of some consecutive blocks (of all by default): float32 [rows, in]."""

    def dense(self, blocks: slice = slice(None)) -> torch.Tensor:
        """The sum of some consecutive blocks (of all by default): float32 [out, in]."""
        slices = self.row_slices(self.stack()[0].part("signs").device)
        return torch.cat([self.dequantize_rows(rows, blocks) for rows in slices])

    @property
    def kernel(self) -> str:
        return backend_of_stacks(self.device)

    def parts_of(self, name: str) -> list[torch.Tensor]:
        """The tensors of that name of all blocks."""
        return [block.part(name) for block in self.stack()]

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
    ``right`` float16 [k, in] (b). Each block costs (2k + 2) · out · in FLOPs where it is dequantized.
    The native kernels add k numbers for every four signs and token instead.
    """

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs", "left", "right")

    def product(self, input: torch.Tensor) -> torch.Tensor:
        signs, left, right = (self.parts_of(name) for name in self.parts(0))
        return factor_linear(input, signs, left, right, self.bias)

    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        signs, left, right = (self.parts_of(name)[blocks] for name in self.parts(0))
        return dequantize_factors([block[rows] for block in signs], [block[rows] for block in left], right)


class PlaneStack(StackedLinear):
    """Ŵ = s ⊙ Σ_j 2^-j S_j: nested codes (see `compress.quantization.nested`).

    The parts of the first block are ``signs`` uint8 [2, out, ceil(in/8)] (S_0 and S_1) and ``scales`` float16
    [out, groups] (s). Every other block has only ``signs`` uint8 [out, ceil(in/8)] (S_j).

    Attributes:
        activations: how inputs are rounded before they are multiplied (see
            `compress.kernels.stack_ops.plane_linear`).
    """

    activations = "floating"

    @staticmethod
    def parts(index: int) -> tuple[str, ...]:
        return ("signs",) if index else ("signs", "scales")

    def product(self, input: torch.Tensor) -> torch.Tensor:
        scales = self.stack()[0].part("scales")
        return plane_linear(input, self.parts_of("signs"), scales, self.bias, self.activations)

    def dequantize_rows(self, rows: slice, blocks: slice = slice(None)) -> torch.Tensor:
        start, _, _ = blocks.indices(len(self.blocks))
        signs = [block[..., rows, :] for block in self.parts_of("signs")[blocks]]
        return dequantize_planes(signs, self.stack()[0].part("scales")[rows], self.in_features, start)
