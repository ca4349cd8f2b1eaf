"""The settings of calibration text: a section of a recipe, and options of the commands that run one step."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field, PositiveInt

from compress.system.settings import Settings

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that every library takes; that of numpy takes no larger one."""


class Section(Settings):
    """A section of a recipe."""


class TextSize(NamedTuple):
    """An amount of calibration text: ``nsamples`` windows of ``seqlen`` tokens."""

    nsamples: int
    seqlen: int

    def __str__(self) -> str:
        return f"{self.nsamples:,} windows of {self.seqlen:,} tokens"


DEFAULT_SIZE = TextSize(128, 512)


class Calibration(Section):
    """Where calibration text comes from, and how much of it methods look at.

    A field's description is its help on the command line.
    """

    source: str = Field(
        "bundled",
        description="text to calibrate on: bundled, wikipedia, brown, a .txt, .jsonl or .parquet file, "
        "hub:DATASET[:CONFIG[:SPLIT[:FIELD]]], or generate (the model writes the text itself)",
    )
    nsamples: PositiveInt | None = Field(
        None,
        description="number of windows of text (inputs of an encoder); by default the method's own",
    )
    seqlen: PositiveInt | None = Field(
        None,
        description="tokens in each window (of an encoder's input: at most); by default the method's own "
        "number, or as many as the model has positions for",
    )
    seed: Seed | None = Field(
        None, description="seed for drawing or generating the text; by default the seed of the recipe"
    )
    chat_template: bool = Field(
        False, description="make each window one conversation, rendered with the tokenizer's chat template"
    )

    @property
    def size(self) -> TextSize:
        """How much text is used."""
        return TextSize(self.nsamples or DEFAULT_SIZE.nsamples, self.seqlen or DEFAULT_SIZE.seqlen)

    def sized(self, size: TextSize) -> Calibration:
        """The same settings, with ``size`` in the place of what was not given."""
        given = {"nsamples": self.nsamples or size.nsamples, "seqlen": self.seqlen or size.seqlen}
        return self.model_copy(update=given)
