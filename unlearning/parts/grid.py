"""The grid that edits of weights must survive."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, nearest_codes, quantize_weight

MARGIN = 0.1
"""How far beyond the edge of its bin an edit ends, in steps of the grid: error feedback and other roundings
move weights by less than that where they move them at all."""

ENOUGH = 0.5
"""Share of the way to the edge that an edit must have gone to be carried over it. Others are taken back."""


@dataclass(frozen=True)
class Grid:
    """The grid that edits must survive: integer codes with a scale and a zero point for each group.

    Attributes:
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.
    """

    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """``int4:64`` or ``int4:channel``.

        Raises:
            BadInput: it is something else.
        """
        found = re.fullmatch(r"int([2-8]):(\d+|channel)", text)
        if found is None or found[2] == "0":
            raise BadInput(
                f"'{text}' is not a grid; write int and the bits (2 to 8), a colon and the group size, such "
                "as int4:64 or int4:channel."
            )
        return cls(int(found[1]), CHANNEL if found[2] == "channel" else int(found[2]))

    def codes(self, weight: torch.Tensor) -> QuantizedWeight:
        """The weight [out, in] on the grid that round-to-nearest chooses for it."""
        return quantize_weight(weight, self.bits, self.group_size, False, torch.float32, check=False)

    def floored(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """``after`` with every edit carried over the edge of its bin or taken back: float32 [out, in]."""
        held = self.codes(before)
        out, groups = held.scales.shape
        old, new = (value.float().reshape(out, groups, -1) for value in (before, after))
        step, zero = held.scales.unsqueeze(-1), held.zeros.float().unsqueeze(-1)
        code = held.codes.view(out, groups, -1).float()
        low, high = old.amin(-1, keepdim=True), old.amax(-1, keepdim=True)
        new = torch.minimum(torch.maximum(new, low), high)
        up = new > old
        edge = step * (code - zero + torch.where(up, 0.5, -0.5))
        beyond = edge + step * torch.where(up, MARGIN, -MARGIN)
        gone = (new - old) / (edge - old).where(edge != old, torch.ones_like(edge))
        carried = torch.where(up, torch.maximum(new, beyond), torch.minimum(new, beyond))
        carried = torch.minimum(torch.maximum(carried, low), high)
        crosses = nearest_codes(carried, step, zero, self.bits) != code
        fixed = (old == low) | (old == high) | (new == old)
        edited = (gone >= ENOUGH) & crosses & ~fixed
        return torch.where(edited, carried, old).view(before.shape)

    def crossings(self, before: torch.Tensor, after: torch.Tensor) -> int:
        """The number of weights whose codes differ."""
        return int((self.codes(before).codes != self.codes(after).codes).sum())
