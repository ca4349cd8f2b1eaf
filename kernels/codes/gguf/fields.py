"""What a block of a GGUF file is made of, whatever its layout in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Fields:
    """N blocks as numbers.

    The value of a weight with code q in group g is (d * s_g) * level(q) - dmin * m_g, or + m instead of the
    last term in a type without group scales.

    Attributes:
        codes: uint8 [N, weights of a block], each in a byte of its own.
        scale: d, float32 [N], exact in float16.
        minimum: dmin, or m in a type without group scales; float32 [N], exact in float16. None in a type that
            has none.
        group_scales: s, int16 [N, groups], in a type that has them.
        group_minima: m, int16 [N, groups], in a type that has them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    group_scales: torch.Tensor | None = None
    group_minima: torch.Tensor | None = None

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Step and offset of every group, float32 [N, groups] each: a weight is step * level + offset.

        A type without group scales has one group. The offset is None in a type that has none.
        """
        if self.group_scales is None:
            return self.scale[:, None], None if self.minimum is None else self.minimum[:, None]
        step = self.scale[:, None] * self.group_scales.float()
        if self.minimum is None or self.group_minima is None:
            return step, None
        return step, -(self.minimum[:, None] * self.group_minima.float())
