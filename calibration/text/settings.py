"""The settings of calibration text: a section of a recipe, and options of the commands that run one step."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from compress.system.settings import Settings


class Section(Settings):
    """A section of a recipe."""


class Calibration(Section):
    """Where calibration text comes from, and how much of it methods look at.

    A field's description is its help on the command line.
    """

    source: str = Field(
        "bundled",
        description="text to calibrate on: bundled, wikipedia, brown, a .txt, .jsonl or .parquet file, "
        "hub:DATASET[:CONFIG[:SPLIT[:FIELD]]], or generate (the model writes the text itself)",
    )
    nsamples: PositiveInt = Field(128, description="number of windows of text (inputs of an encoder)")
    seqlen: PositiveInt = Field(2048, description="tokens in each window (of an encoder's input: at most)")
    seed: int | None = Field(
        None, description="seed for drawing or generating the text; by default the seed of the recipe"
    )
    chat_template: bool = Field(
        False, description="make each window one conversation, rendered with the tokenizer's chat template"
    )
