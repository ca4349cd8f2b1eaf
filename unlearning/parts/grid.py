"""The grid that edits of weights must survive."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, nearest_codes, quantize_weight


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

    def movable(self, weight: torch.Tensor) -> torch.Tensor:
        """Where a weight [out, in] may change and its grid stays: all but the ends of each group. bool."""
        grouped = weight.reshape(*self.codes(weight).scales.shape, -1)
        ends = (grouped == grouped.amin(-1, keepdim=True)) | (grouped == grouped.amax(-1, keepdim=True))
        return ~ends.view(weight.shape)

    def settled(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """``after`` on the grid of ``before``, with every edit that reached another bin in the middle of it.

        The ends of groups are as before, and no weight lies beyond them, so that the grid is the same.

        Args:
            before, after: the weight before and after it was edited, [out, in].

        Returns:
            float32 [out, in].
        """
        held = self.codes(before)
        out, groups = held.scales.shape
        old, new = (value.float().reshape(out, groups, -1) for value in (before, after))
        step, zero = held.scales.unsqueeze(-1), held.zeros.float().unsqueeze(-1)
        # The grid of a group spans 0 and its ends. Beyond them it would become another one.
        low, high = old.amin(-1, keepdim=True).clamp(max=0), old.amax(-1, keepdim=True).clamp(min=0)
        code = nearest_codes(new, step, zero, self.bits)
        crossed = code != held.codes.view(out, groups, -1)
        settled = torch.where(crossed, step * (code - zero), new).clamp(low, high)
        return torch.where(self.movable(before), settled.view(before.shape), before.float())

    def crossings(self, before: torch.Tensor, after: torch.Tensor) -> int:
        """The number of weights whose codes differ."""
        return int((self.codes(before).codes != self.codes(after).codes).sum())
