"""Options that methods of unlearning share, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from compress.calibration.text.records import read_records
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.integer import number_of_groups
from compress.method import MethodOptions
from compress.unlearning.parts.grid import Grid

SETS = (
    "a .jsonl file with text, question and answer, or messages; or people:, tofu:, muse:, wmdp: or hub: and "
    "the name of a set"
)

CHECKPOINTING = "compute each layer again in the backward pass: takes less memory and a third more time"


def low_rank_learning_rate(given: Mapping[str, object]) -> float | None:
    """The default learning rate of low-rank updates; None for all weights, where it depends on the model.

    Low-rank updates begin at 0, and hardly learn at the rate that suits all weights.
    """
    return 2e-4 if given.get("train") == "lora" else None


class ForgetOptions(MethodOptions):
    """What is to be forgotten, and what is to be kept."""

    forget: str = Field(description=f"records to forget: {SETS}")
    retain: str = Field(description=f"records to retain: {SETS}")

    def content(self) -> dict[str, str]:
        sources: dict[str, str | None] = {"forget": self.forget, "retain": self.retain}
        return {
            name: read_records(source, name).sha256
            for name, source in sources.items()
            if source is not None  # some methods can do without
        }


def rate_for(width: int) -> float:
    """The learning rate for all weights of a model, unless another one is asked for.

    At the hidden size of 4096, that of the models in most papers, it is what these take (1e-5). The
    smaller a model, the larger the steps that it needs: so small ones would change little on the offline
    benchmark's model, whose hidden size is 576.
    """
    return 2e-4 * (576 / width) ** 1.5


class TrainingOptions(ForgetOptions):
    """How a method trains."""

    train: Literal["full", "lora"] = Field(
        "full", description="train all weights, or low-rank updates of the linears' weights"
    )
    rank: PositiveInt = Field(32, description="rank of the low-rank updates (--train lora)")
    learning_rate: PositiveFloat | None = Field(
        default_factory=low_rank_learning_rate,
        description="learning rate at the first step; it falls to 0 along a line. By default 2e-4 for "
        "low-rank updates, and for all weights the smaller, the wider the model: 2e-4 at a hidden size of "
        "576, about 1e-5 at 4096",
    )
    epochs: PositiveInt = Field(12, description="number of passes over the records to forget")
    batch_size: PositiveInt = Field(8, description="records to forget in a step, beside as many to retain")
    max_gradient_norm: PositiveFloat = Field(
        1.0, description="gradients above this norm are scaled down to it"
    )
    seqlen: PositiveInt = Field(256, description="tokens in a piece of a long text")
    gradient_checkpointing: bool = Field(False, description=CHECKPOINTING)
    survive: list[str] = Field(
        [],
        description="grids of later steps that what is unlearned must survive, such as int4:64 (bits and "
        "group size): the steps of the training take turns, with the weights as they are and as each grid "
        "rounds them (--train full)",
    )

    @model_validator(mode="after")
    def _can_survive(self) -> Self:
        if self.survive and self.train == "lora":
            raise ValueError("survive trains the weights that are rounded; set train to full")
        for text in self.survive:
            try:
                Grid.parse(text)
            except BadInput as error:
                raise ValueError(str(error).removesuffix(".")) from None
        return self


def check_trainable(shape: ModelShape, method: str, options: TrainingOptions | None = None) -> None:
    """Make sure that a method may edit the weights of a model that predicts the next token.

    Raises:
        BadInput: the model is an encoder, has no head, or is quantized; or its linears have no groups of the
            size that edits must survive.
    """
    if shape.anatomy.kind != "decoder" or shape.anatomy.head is None:
        raise BadInput(f"{method} unlearns next-token predictions, but this model makes none.")
    if "quantization_config" in shape.config:
        raise BadInput(
            "The model is quantized already, and its packed weights cannot be edited; unlearn first."
        )
    for text in options.survive if options is not None else ():
        group_size = Grid.parse(text).group_size
        for name, (_, width) in shape.linears().items():
            number_of_groups(width, group_size, name)
