"""The settings of calibration text: a section of a recipe, and options of the commands that run one step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

SEQLEN = 2048
"""Tokens in a window if the recipe does not say how many and the model has positions for so many."""


class Section(BaseModel):
    """A section of a recipe: it refuses unknown keys and infinite or NaN numbers, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    seqlen: PositiveInt | None = Field(
        None,
        description="tokens in each window (of an encoder's input: at most); by default 2048, or as many as "
        "the model has positions for",
    )
    seed: int | None = Field(
        None, description="seed for drawing or generating the text; by default the seed of the recipe"
    )
    chat_template: bool = Field(
        False, description="make each window one conversation, rendered with the tokenizer's chat template"
    )
