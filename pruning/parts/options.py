"""Options that several pruning methods have in common."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from compress.method import MethodOptions


class ParameterRatio(MethodOptions):
    """How much to remove, as a share of parameters."""

    ratio: float = Field(
        ge=0, lt=1, description="share to remove of the parameters of all attention and MLP projections"
    )


class WidthMultiple(MethodOptions):
    """Which widths are allowed."""

    width_multiple: PositiveInt = Field(1, description="keep a multiple of this many neurons in every layer")


class LayerCount(MethodOptions):
    """How much to remove, as a number of layers."""

    layers: PositiveInt = Field(description="how many layers to remove in all")
