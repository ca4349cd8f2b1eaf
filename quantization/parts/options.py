"""Options that several methods have in common, as classes from which a method's options are put together.

Fields appear in the help in the order of the bases from last to first, then those of the class itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import Field, PositiveInt, model_validator

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, divisors_near
from compress.method import MethodOptions
from compress.storage.formats.gptq import GPTQFormat

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Width = TypeVar("Width")

DEFAULT_BITS: Any = 4
"""A number that every literal type of widths has."""


class BitsOptions(MethodOptions, Generic[Width]):
    """The bits of every weight. ``Width`` is a literal type of the numbers that the method offers."""

    bits: Width = Field(DEFAULT_BITS, description="bits of a weight")
    set: dict[str, Width] = Field(
        {},
        description="other bits for the linears that a pattern matches (patterns as in 'ignore'); where "
        "several match, the last one counts",
    )


class GroupOptions(MethodOptions):
    """The weights that share a scale."""

    group_size: PositiveInt | Literal["auto", "channel"] = Field(
        "auto",
        description="number of consecutive inputs that share a scale; it must divide the input dimensions; "
        "auto: 64, or if that does not divide them all, the largest of 32, 16 and 8 that does; channel: one "
        "scale for each output channel",
    )

    def group_length(self, widths: Mapping[str, int]) -> int:
        """The group size as formats take it: `CHANNEL` stands for a whole row.

        Args:
            widths: name -> input dimension of what is packed.

        Raises:
            BadInput: the group size does not divide one of them.
        """
        if self.group_size == "channel":
            return CHANNEL
        common = math.gcd(*widths.values())
        sizes = (64, 32, 16, 8) if self.group_size == "auto" else (self.group_size,)
        if (found := next((size for size in sizes if common % size == 0), None)) is not None:
            return found
        wanted = sizes[-1]
        name, width = next((name, width) for name, width in widths.items() if width % wanted)
        better = " or ".join(filter(None, (", ".join(divisors_near(common, wanted)), "channel")))
        raise BadInput(
            f"A group size of {wanted} does not divide the input dimension {width} of '{name}'; use {better} "
            "for all linears, or leave out with 'ignore' what does not fit."
        )


class IgnoreOptions(MethodOptions):
    """The linears that are left alone."""

    ignore: list[str] = Field(
        [],
        description="linears to leave as they are: full names, globs, or regular expressions after 're:'",
    )


class TableOptions(MethodOptions):
    """The head and the token embedding, which every method rounds to the nearest code or leaves alone."""

    lm_head_bits: Bits | None = Field(
        None,
        description="round the head to codes of this many bits: gptq, awq and apiq by what it reads, with "
        "error feedback, and other methods to the nearest codes; without it the head is kept",
    )
    embedding_bits: Bits | None = Field(
        None,
        description="the same for the token embedding, to the nearest codes; a model with a tied head has "
        "one table for both, which is rounded as the head",
    )


class DampingOptions(MethodOptions):
    """What makes a Hessian invertible."""

    damping: float | None = Field(
        None,
        gt=0,
        le=1,
        description="add this share of the mean of the Hessian's diagonal to the diagonal; by default the "
        "inputs of the linear divided by the tokens of the text, so that little text is believed less, but "
        "at least 0.01",
    )


class WeightOptions(IgnoreOptions, TableOptions, GroupOptions, BitsOptions[Bits]):
    """Options of the methods that round weights to an integer grid of groups."""

    symmetric: bool | None = Field(
        None,
        description="fix the zero points in the middle of the codes, or store one for each group; by default "
        "they are fixed only where linears have different widths, which transformers reads in no other way",
    )
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors",
        description="how to store the codes; the layout of gptq has one width for all linears, of 2, 3, 4 "
        "or 8 bits",
    )
    mix: bool = Field(
        False,
        description="give each linear its own bits by measured sensitivity, in no more bytes than 'bits' "
        "everywhere would take",
    )

    @model_validator(mode="after")
    def _stored(self) -> Self:
        if self.mix and self.set:
            raise ValueError("mix chooses the bits of every linear; leave out set")
        if self.mix and self.format == "gptq":
            raise ValueError("the format gptq has one width for all linears; leave out mix or the format")
        if self.format == "gptq" and not {self.bits, *self.set.values()} <= set(GPTQFormat.widths):
            raise ValueError(
                "the format gptq has 2, 3, 4 or 8 bits; use one of these, or the format compressed-tensors"
            )
        return self


class StackOptions(IgnoreOptions, TableOptions):
    """Options of the methods whose models can be loaded at any size."""

    importance: Literal["gradient", "perplexity"] = Field(
        "gradient",
        description="how to decide which linear gets its next block first; gradient: by the loss that its "
        "residual causes per byte, estimated with one backward pass; perplexity: as published, by trying "
        "every linear at every level, which takes hundreds of passes per level",
    )
    order_windows: PositiveInt = Field(
        16, description="number of calibration windows, of up to 128 tokens, to find the order with"
    )
