"""The grid of a later step, which what is unlearned must survive."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, quantize_weight


@dataclass(frozen=True)
class Grid:
    """The grid of a later step: integer codes with a scale and a zero point for each group.

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

    def crossings(self, before: torch.Tensor, after: torch.Tensor) -> int:
        """The number of weights whose codes differ."""
        return int((self.codes(before).codes != self.codes(after).codes).sum())
