"""BlockPruner (Findings of ACL 2025): remove attention and MLP blocks one by one, by perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from compress.calibration.statistics.losses import LN_LARGEST, scored_positions
from compress.calibration.text.settings import TextSize
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.pruning.parts.block_losses import BlockLosses
from compress.pruning.parts.blocks import (
    PARTS,
    Block,
    Part,
    block_parameters,
    layer_parameters,
    plan_without_blocks,
    remove_blocks,
)
from compress.storage.lineage import LINEAGE, read_lineage

if TYPE_CHECKING:
    from compress.method import StepContext
    from compress.system.progress import Progress


class Removal(NamedTuple):
    """A block that is removed, and how it was chosen."""

    layer: int
    part: Part
    perplexity: float  # of the model without it, on all calibration windows
    before: float  # of the model with it

    @property
    def block(self) -> Block:
        return Block(self.layer, self.part)


class BlockPruner(Method["BlockPruner.Options"]):
    """Remove, one after the other, the blocks (attention or MLP, with its norms) that a model misses least.

    With R the blocks removed so far (none at the beginning), repeat until the target is reached (section 3):

    1. For every block b that is left, PPL(b) = exp(mean over windows of the mean token loss) of the model
       without R and b.
    2. b* = argmin PPL(b), and R = R + {b*}.

    That is ``cost: blocks``, which tends to remove small blocks first. By default b* is the argmin of (ln
    PPL(b) - ln PPL(R)) / parameters of b instead (``cost: parameters``).

    Losses are computed from float32 logits of real tokens, with sums in float64; `BlockLosses` finds them
    fast. The last attention block always stays, because without one tokens do not see each other.

    Results are nested: the first n removals are the result for n blocks. ``order_from`` takes the removals
    from an earlier result, so a smaller target needs no search, and a larger one continues where the earlier
    result ended.
    """

    name = "blockpruner"
    family = "pruning"
    paper = Paper("BlockPruner: Fine-grained Pruning for Large Language Models", "2406.10594")
    text_size = TextSize(8, 512)

    class Options(MethodOptions):
        renamed: ClassVar[Mapping[str, str]] = {"keep_ratio": "ratio, the share to remove: 1 - keep_ratio"}

        blocks: PositiveInt | None = Field(None, description="how many blocks to remove")
        ratio: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="remove blocks until at least this share of the parameters of all layers is gone "
            "(embeddings, final norm and head do not count)",
        )
        max_perplexity: float | None = Field(
            None,
            gt=1,
            description="remove blocks while the perplexity on the calibration windows is at most this",
        )
        mode: Literal["mix", "attention", "mlp"] = Field("mix", description="which blocks may be removed")
        cost: Literal["blocks", "parameters"] = Field(
            "parameters",
            description="remove next the block with the least rise of the logarithm of the perplexity per "
            "parameter, or with the least perplexity (blocks, as published)",
        )
        order_from: Path | None = Field(
            None,
            description="reuse the order of removal of an earlier result (its folder) for the same model and "
            "windows",
        )

        @model_validator(mode="after")
        def _one_target(self) -> Self:
            targets = (self.blocks, self.ratio, self.max_perplexity)
            if sum(target is not None for target in targets) != 1:
                raise ValueError("give exactly one of blocks, ratio and max_perplexity")
            return self

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        """The shape if the smallest blocks are removed, because the text decides which ones really are.

        With ``blocks`` the real model is at most as large as this, and with ``ratio`` its size differs by one
        block at most. With ``max_perplexity`` the plan removes nothing.
        """
        if shape.anatomy.kind != "decoder" or shape.anatomy.head is None:
            raise BadInput(
                "BlockPruner searches by the loss of the next token, which this "
                f"{shape.anatomy.model_type} model does not predict; use a causal language model."
            )
        sizes, total = block_parameters(shape), layer_parameters(shape)
        removed: list[Block] = []
        while options.max_perplexity is None and not _reached(removed, sizes, total, options):
            left = _candidates(removed, sizes, options)
            if not left:
                which = "blocks" if options.mode == "mix" else f"{options.mode} blocks"
                raise BadInput(
                    f"BlockPruner can remove at most {len(removed)} {which} from this model, which leaves "
                    f"{1 - _gone(removed, sizes, total):.1%} of its layers' parameters."
                )
            removed.append(min(left, key=lambda block: sizes[block]))
        return plan_without_blocks(shape, removed)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        shape = ModelShape.of(model.checkpoint)
        sizes, total = block_parameters(shape), layer_parameters(shape)
        calibration = context.calibration
        windows = calibration.select(scored_positions(calibration).any(1))
        if not len(windows):
            raise BadInput("The calibration windows have no token to predict; use longer ones.")
        limit = options.max_perplexity or math.inf
        earlier = _earlier(options, model, calibration)
        journal = context.journal("search")
        journal.restore([])
        done = journal.state.get("removals", torch.empty(0)).tolist()
        removals = [Removal(int(row[0]), PARTS[int(row[1])], *row[2:]) for row in done]
        following: Removal | None = None
        rounds = _rounds(sizes, options)
        while not _reached(removed := [removal.block for removal in removals], sizes, total, options):
            left = _candidates(removed, sizes, options)
            if not left:
                break
            if len(removals) < len(earlier):
                following = earlier[len(removals)]
            else:
                costs = {block: sizes[block] / total if options.cost == "parameters" else 1 for block in left}
                report = partial(_report, context.progress, len(removals), rounds)
                report(0.0)
                losses = BlockLosses(model, windows, removed, costs, context.folder / "search", report)
                following = self.search(losses)
            if following.perplexity > limit:
                break
            removals.append(following)
            rows = [(layer, PARTS.index(part), *others) for layer, part, *others in removals]
            journal.state["removals"] = torch.tensor(rows, dtype=torch.float64)
            journal.commit(len(removals), [])
        if following is not None and not removals and following.before > limit:
            raise BadInput(
                f"The perplexity on the calibration windows is {following.before:.2f} before anything is "
                "removed; give a larger max_perplexity."
            )
        remove_blocks(context.draft, removed)
        kept = [1 - _gone(removed[: count + 1], sizes, total) for count in range(len(removed))]
        details = {
            "model_sha256": model.checkpoint.sha256,
            "calibration_sha256": calibration.sha256,
            "windows": len(windows),
            "removed": [
                {**removal._asdict(), "kept": share} for removal, share in zip(removals, kept, strict=True)
            ],
        }
        return StepReport(_summary(removals, kept, len(windows)), details)

    def search(self, losses: BlockLosses) -> Removal:
        """Choose the block to remove next, in one round of the search."""
        best = losses.best()
        before, after = float(losses.current.mean()), float(losses.loss[best].mean())
        if not max(before, after) < LN_LARGEST:
            raise CompressError(
                f"Without one more block the model has a loss of at least {after:.0f} nats per token, so it "
                "is broken or overflows; remove fewer blocks."
            )
        return Removal(*losses.blocks[best], math.exp(after), math.exp(before))


def _candidates(
    removed: Sequence[Block], sizes: Mapping[Block, int], options: BlockPruner.Options
) -> list[Block]:
    """The blocks that may go next, in the order of the data flow."""
    left = [block for block in sizes if block not in removed]
    last = sum(block.part == "attention" for block in left) == 1
    parts = PARTS if options.mode == "mix" else (options.mode,)
    return [block for block in left if block.part in parts and not (last and block.part == "attention")]


def _reached(
    removed: Sequence[Block], sizes: Mapping[Block, int], total: int, options: BlockPruner.Options
) -> bool:
    if options.blocks is not None:
        return len(removed) >= options.blocks
    return options.ratio is not None and _gone(removed, sizes, total) >= options.ratio


def _rounds(sizes: Mapping[Block, int], options: BlockPruner.Options) -> int:
    """How many rounds the search takes if blocks of average size go; without a target, the most it can."""
    if options.blocks is not None:
        return options.blocks
    left = len(_candidates([], sizes, options))
    return left if options.ratio is None else math.ceil(options.ratio * len(sizes))


def _report(progress: Progress, finished: int, rounds: int, share: float) -> None:
    """Report a share of a round as its share of the whole search."""
    progress("choosing the blocks to remove", min(1.0, (finished + share) / rounds))


def _gone(removed: Sequence[Block], sizes: Mapping[Block, int], total: int) -> float:
    """The share of all layers' parameters that is removed."""
    return sum(sizes[block] for block in removed) / total


def _earlier(options: BlockPruner.Options, model: StreamedModel, windows: Windows) -> list[Removal]:
    """The removals of the earlier result in ``order_from``; none without that option."""
    if options.order_from is None:
        return []
    path = options.order_from
    lineage = read_lineage(path.parent if path.name == LINEAGE else path)
    steps = [step for step in (lineage.steps if lineage else []) if step.method == BlockPruner.name]
    if not steps:
        raise BadInput(f"'{path}' is not a result of BlockPruner, so it has no order of removal.")
    found = steps[-1]
    same = {
        "model": found.details["model_sha256"] == model.checkpoint.sha256,
        "calibration": found.details["calibration_sha256"] == windows.sha256,
    } | {key: found.options[key] == getattr(options, key) for key in ("mode", "cost")}
    if different := [key for key, equal in same.items() if not equal]:
        raise BadInput(
            f"The order of removal in '{path}' was found with another {' and '.join(different)}; search "
            "again without order_from."
        )
    return [Removal(**{key: removal[key] for key in Removal._fields}) for removal in found.details["removed"]]


def _summary(removals: Sequence[Removal], kept: Sequence[float], windows: int) -> str:
    if not removals:
        return "removed nothing, because without any one block the perplexity would be above max_perplexity."
    counts = [sum(removal.part == part for removal in removals) for part in PARTS]
    return (
        f"removed {counts[0]} attention and {counts[1]} MLP blocks, {1 - kept[-1]:.1%} of the layers' "
        f"parameters; perplexity on the {windows} calibration windows: {removals[0].before:.2f} before, "
        f"{removals[-1].perplexity:.2f} after."
    )
