"""What a recipe says about calibration text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(Section):
    """The text that methods look at while they compress."""

    source: str = Field(
        "bundled",
        description="bundled, wikipedia, brown, a file, hub:DATASET[:CONFIG[:SPLIT[:FIELD]]], or generate: "
        "written by the model itself",
    )
    nsamples: PositiveInt = Field(128, description="number of windows")
    seqlen: PositiveInt = Field(2048, description="tokens in a window")
    seed: int | None = Field(None, description="order of the documents; the recipe's seed if not given")
    chat_template: bool = Field(False, description="render conversations with the tokenizer's chat template")
