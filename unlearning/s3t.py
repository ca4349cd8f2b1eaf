"""S3T (ICLR 2025): train in shards, slices and layers, so that records can be deleted exactly, at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from compress.errors import BadInput
from compress.method import Method, MethodOptions, Paper
from compress.storage.sharded import (
    Example,
    Served,
    Shard,
    is_sharded,
    prefix_sha256,
    read_stage,
    stage_file,
    stage_name,
)
from compress.system.files import file_sha256
from compress.unlearning.parts.options import CHECKPOINTING, check_trainable
from compress.unlearning.parts.orders import (
    cyclic_orders,
    even_parts,
    live_length,
    matched_orders,
    served_prefix,
)

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.text.records import TokenSequence
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext, StepReport

Slices = list[list[str]]
"""The ids of the records in each slice."""


class S3T(Method["S3T.Options"]):
    """Train an ensemble from which records are deleted exactly: ``compress-model s3t``.

    The training records are split into m disjoint shards, and each shard into L slices of the same size. The
    layers of the model are split into L groups, the top ones first. For an order (p1, ..., pL) of a shard's
    slices, stage i trains only the LoRA of layer group i, on the union of the slices p1 to pi, on top of the
    earlier groups, which are frozen. Each shard has B orders:

    - cyclic rotations (`cyclic_orders`), where all records are equally likely to be deleted;
    - those of a bipartite matching (`matched_orders`), where each has a known chance (``priors``). Records
      of a shard are then sliced in the order of their chances.

    To delete a record is to delete its slice d. In an order with d in place i, the groups from i on, which
    have seen d, are switched off and their files removed; what is left was never trained on d. Each shard is
    served by the order with the longest live prefix, and the model's logits are the mean over the shards. A
    shard is trained again only once all its orders have lost their first slice, after about
    m·L·H(m·min(B, L)) deletions for all shards (`deletions_until_empty`).

    A stage's seed is made of the run's seed, its shard, and the slices it sees, so training without the
    deleted slice gives the same LoRA bit for bit, on the same machine with the same software. The sha256 of
    what is served is the receipt, and ``compress-model s3t verify`` trains it again.

    Stages with the same slices in front are one stage, which more than L orders share.
    """

    name = "s3t"
    family = "unlearning"
    paper = Paper(
        "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning", arxiv="2406.16257"
    )
    needs_calibration = False
    needs_package = "peft"
    command = "compress-model s3t"

    class Options(MethodOptions):
        shards: PositiveInt = Field(5, description="m, the number of models that share the records")
        slices: PositiveInt = Field(6, description="L, the number of slices in a shard, and of layer groups")
        orders: PositiveInt = Field(6, description="B, the number of orders of slices to train in each shard")
        priors: str | None = Field(
            None,
            description="a JSON file with each record's id and its chance to be deleted, for orders by "
            "bipartite matching; without it they are cyclic rotations",
        )
        expected_deletions: NonNegativeInt = Field(
            100, description="how many deletions from all shards the orders are made for (--priors only)"
        )
        rank: PositiveInt = Field(32, description="rank r of the LoRA; its alpha is 2 r, over the root of r")
        learning_rate: PositiveFloat = Field(
            2e-4,
            description="learning rate at the first step of a stage; it falls to 0 along a line. The "
            "published code takes 2e-5 for Llama",
        )
        epochs: PositiveInt = Field(3, description="number of passes of a stage over its slices")
        batch_size: PositiveInt = Field(8, description="number of sequences in a step")
        max_gradient_norm: PositiveFloat = Field(
            1.0, description="gradients above this norm are scaled down to it"
        )
        seqlen: PositiveInt = Field(256, description="tokens in a piece of a long text")
        gradient_checkpointing: bool = Field(False, description=CHECKPOINTING)

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if is_sharded(shape.config):
            raise BadInput("S3T deletes at once: use 'compress-model s3t delete' on this folder.")
        raise BadInput(
            "S3T is no step of a recipe, because it trains an ensemble on data of yours; use 'compress-model "
            "s3t train', and then 's3t delete'."
        )

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        raise AssertionError("plan refuses S3T as a step")


def check_model(shape: ModelShape, options: S3T.Options) -> None:
    """Make sure that S3T can train a model.

    Raises:
        BadInput: it is quantized, makes no next-token predictions, was trained by S3T before, or has fewer
            layers than there are slices.
    """
    if is_sharded(shape.config):
        raise BadInput("The model is an ensemble that S3T trained; train its base model instead.")
    if shape.is_pruned:
        raise BadInput("The layers of this model differ; train with S3T before pruning.")
    check_trainable(shape, "S3T")
    if options.slices > shape.num_layers:
        raise BadInput(
            f"Every slice needs a layer of its own, but the model has {shape.num_layers} layers for "
            f"{options.slices} slices; use --slices {shape.num_layers} or fewer."
        )


def partition(
    ids: Sequence[str], priors: Mapping[str, float] | None, options: S3T.Options, seed: int
) -> list[Slices]:
    """Split records into shards and slices at random, or by their priors.

    With priors, every shard gets its share of likely and of unlikely deletions, and puts records of similar
    chances into one slice.

    Raises:
        BadInput: there are fewer records than slices in all shards.
    """
    if options.shards > len(ids):
        raise BadInput(f"There are {len(ids)} records for {options.shards} shards; use fewer --shards.")
    if options.shards * options.slices > len(ids):
        raise BadInput(
            f"There are {len(ids)} records for {options.shards} shards of {options.slices} slices; use fewer "
            "--shards or --slices."
        )
    mixed = list(ids)
    random.Random(seed).shuffle(mixed)
    if priors is None:
        shards = [[mixed[i] for i in part] for part in even_parts(len(mixed), options.shards)]
    else:
        mixed.sort(key=lambda name: priors[name])
        shards = [mixed[number :: options.shards] for number in range(options.shards)]
    return [[[shard[i] for i in part] for part in even_parts(len(shard), options.slices)] for shard in shards]


def orders_of(slices: Slices, priors: Mapping[str, float] | None, options: S3T.Options) -> list[list[int]]:
    """The orders of a shard's slices.

    Raises:
        BadInput: there are not so many orders.
    """
    if priors is None:
        return [list(order) for order in cyclic_orders(range(len(slices)), options.orders)]
    chances = [sum(priors[name] for name in names) for names in slices]
    if not any(chances):  # none of the likely records is in this shard, so no slice of it is likelier
        chances = [1.0] * len(chances)
    deletions = options.expected_deletions / options.shards  # every shard has its share of the likely records
    return [list(order) for order in matched_orders(chances, options.orders, deletions)]


def sequences_of(
    slices: Slices, dead: Sequence[int], prefix: Sequence[int], examples: Mapping[str, Example]
) -> list[TokenSequence]:
    """What the stage of ``prefix`` is trained on: the records of its slices, without any dead slice."""
    from compress.calibration.text.records import TokenSequence

    return [
        TokenSequence(name, tokens, labels)
        for number in prefix
        if number not in dead
        for name in slices[number]
        if name in examples
        for tokens, labels in examples[name].sequences
    ]


Learn = Callable[[Sequence[int], Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]
"""Trains the stage of a prefix of slices on top of the LoRA of the earlier stages."""


def train_orders(
    orders: Sequence[Sequence[int]], folder: Path, learn: Learn, done: Callable[[int], None]
) -> dict[str, str]:
    """Train every stage of every order, and write each into a file of its own.

    Stages whose file is there are not trained again, so a killed training goes on with the first that is
    missing.

    Args:
        orders: of one shard, or prefixes of them.
        folder: of the shard.
        learn: trains one stage.
        done: told after each stage how many there are.

    Returns:
        Name of a stage -> sha256 of its file.
    """
    from compress.storage.writer import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for order in orders:
        earlier: dict[str, Tensor] = {}
        for size in range(1, len(order) + 1):
            name = stage_name(order[:size])
            file = stage_file(folder, order[:size])
            if not file.exists():
                write_tensors(learn(order[:size], earlier), file)
            earlier |= read_stage(file)
            found[name] = file_sha256(file)
            done(len(found))
    return found


def served(shard: Shard) -> Served:
    """What a shard serves: the longest prefix of its orders without a dead slice, with its receipt."""
    prefix = list(served_prefix(shard.orders, shard.dead))
    stages = [shard.stages[stage_name(prefix[:size])] for size in range(1, len(prefix) + 1)]
    return Served(prefix=prefix, sha256=prefix_sha256(stages))


def without(shard: Shard, ids: set[str]) -> Shard:
    """A shard after the deletion of records: their slices are dead, and so is every stage that saw them."""
    hit = [number for number, names in enumerate(shard.slices) if ids & set(names)]
    if not hit:
        return shard
    dead = sorted({*shard.dead, *hit})
    live = {
        stage_name(order[:size]) for order in shard.orders for size in range(1, live_length(order, dead) + 1)
    }
    left = shard.model_copy(
        update={
            "slices": [[name for name in names if name not in ids] for names in shard.slices],
            "dead": dead,
            "stages": {name: sha256 for name, sha256 in shard.stages.items() if name in live},
        }
    )
    return left.model_copy(update={"served": served(left)})


def again(shard: Shard, priors: Mapping[str, float] | None, options: S3T.Options) -> Shard:
    """An exhausted shard before it is trained again: its remaining records in new slices, without stages.

    If there are fewer records than slices, each is a slice.
    """
    ids = [name for names in shard.slices for name in names]
    count = min(options.slices, len(ids))
    slices = [[ids[i] for i in part] for part in even_parts(len(ids), count)]
    possible = count if priors is not None else _factorial_at_most(count, options.orders)
    fewer = options.model_copy(update={"orders": min(options.orders, possible)})
    return Shard(
        generation=shard.generation + 1,
        slices=slices,
        orders=orders_of(slices, priors, fewer),
        dead=[],
        stages={},
        served=Served(prefix=[], sha256=prefix_sha256([])),
        machine=shard.machine,
    )


def _factorial_at_most(count: int, most: int) -> int:
    product = 1
    for number in range(2, count + 1):
        product = min(product * number, most)
    return product
