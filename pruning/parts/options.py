"""Options that several pruning methods have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveInt

from compress.method import MethodOptions


class ParameterRatio(MethodOptions):
    """How much to remove, as a share of parameters."""

    ratio: float = Field(
        ge=0, lt=1, description="share to remove of the parameters of all attention and MLP projections"
    )


class WidthMultiple(MethodOptions):
    """Which widths are allowed."""

    width_multiple: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="keep a multiple of this many neurons in every layer, and heads whose widths together "
        "are a multiple of it; auto: 64, which suits the groups of quantization, and in layers of less than "
        "512 neurons the largest power of two up to an eighth of them, but at least 8",
    )

    def multiple(self, neurons: Iterable[int]) -> int:
        """The multiple for a model whose layers have these numbers of ``neurons``; the widest counts."""
        if self.width_multiple != "auto":
            return self.width_multiple
        widest = max(neurons, default=0)
        most = max(min(64, max(8, widest // 8), widest), 1)
        return 1 << (most.bit_length() - 1)


class LayerCount(MethodOptions):
    """How much to remove, as a number of layers."""

    layers: PositiveInt = Field(description="how many layers to remove in all")
