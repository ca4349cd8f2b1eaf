"""The order of the blocks of a model in stacks: which linear gets its next block first.

There is one order for all sizes (see `compress.storage.formats.stacks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.anatomy import weight
from compress.calibration.statistics.fisher import Fisher, expected_loss, sampled_loss
from compress.calibration.statistics.losses import precise_losses, scored_positions
from compress.engine.branches import Branches
from compress.engine.journal import Journal
from compress.engine.stream import Layer, StreamedModel
from compress.engine.windows import Windows
from compress.kernels.layers.stacked import StackedLinear
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.stacks import StackFormat, with_blocks

if TYPE_CHECKING:
    from compress.method import StepContext
    from compress.quantization.parts.options import StackOptions
    from compress.quantization.parts.stacker import Stacker

LENGTH = 128
"""Tokens in a window that the order is found with: many short windows tell more than a few long ones."""


def find_order(
    model: StreamedModel, stacker: Stacker, options: StackOptions, context: StepContext
) -> list[int]:
    """Find the order by the measure that the options name.

    Args:
        model: the dense model.
        stacker: its draft holds all blocks, on disk.
        options: of the method.
        context: of the step.

    Returns:
        For every block but the first ones, the index of its linear in ``stacker.modules``.
    """
    if stacker.form.blocks == 1:
        return []  # the first blocks are always there
    windows = context.calibration.part(options.order_windows, LENGTH)
    if options.importance == "perplexity":
        found = perplexities(stacker, windows, context)
        return [int(index) for level in found for index in level.argsort(stable=True)]
    losses = expected_losses(model, stacker, windows, context)
    form, infos = stacker.form, stacker.draft.tensors
    costs = [
        [sum(infos[key].nbytes for key in form.names(name, index)) for index in range(form.blocks)]
        for name in stacker.modules
    ]
    return by_gain([losses[name].tolist() for name in stacker.modules], costs)


def by_gain(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> list[int]:
    """Sort blocks so that the total loss falls as fast as it can with the bytes.

    The loss of a linear as a function of its bytes is replaced by its lower convex hull, because a block that
    gains little may have to come before a block that gains much. On a hull the gain per byte falls from block
    to block, so all blocks can be sorted by it.

    Args:
        losses: for every linear, the loss with 1, 2, ... blocks.
        costs: for every linear, the bytes of each block.

    Returns:
        For every block but the first ones, the index of its linear.
    """
    ranked: list[tuple[float, int]] = []
    for linear, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        hull: list[tuple[float, float, int]] = []  # gain, bytes, blocks
        for index in range(1, len(loss)):
            gain, size, blocks = loss[index - 1] - loss[index], cost[index], 1
            while hull and gain * hull[-1][1] > hull[-1][0] * size:
                before = hull.pop()
                gain, size, blocks = before[0] + gain, before[1] + size, before[2] + blocks
            hull.append((gain, size, blocks))
        ranked += [(gain / size, linear) for gain, size, blocks in hull for _ in range(blocks)]
    return [linear for _, linear in sorted(ranked, key=lambda entry: -entry[0])]


def expected_losses(
    model: StreamedModel, stacker: Stacker, windows: Windows, context: StepContext
) -> dict[str, torch.Tensor]:
    """The loss that every linear alone causes with 1, 2, ... of its blocks, to second order.

    See `expected_loss` for how it is estimated from the Fisher information and the residual.

    Returns:
        Full name of a linear -> float64 [blocks], nats per token.
    """
    form, found = stacker.form, dict[str, torch.Tensor]()
    fisher = Fisher(model, windows, sampled_loss(model, windows, context.seed), context.folder / "order")
    for layer in model.walk(None, label="finding the order"):
        information = fisher.read(layer)
        for path, stored in stacker.wanted(layer).items():
            name, left = stored.removesuffix(".weight"), weight(layer.linears[path]).clone()
            stack = form.linear(left.shape[1], left.shape[0], form.read(name, stacker.draft)).to(left.device)
            of_weights, losses = information[path], []
            for index in range(form.blocks):
                left -= stack.dense(slice(index, index + 1))
                losses.append(expected_loss(of_weights, left, windows))
            found[name] = torch.tensor(losses, dtype=torch.float64)
    return found


def perplexities(stacker: Stacker, windows: Windows, context: StepContext) -> torch.Tensor:
    """The published measure: with all linears at b blocks, the perplexity when one gets its next block.

    For one b all linears are tried in one walk through the model, each from its own layer on. NaN counts as
    infinite.

    Returns:
        float64 [blocks - 1, linears].
    """
    journal = Journal(context.folder / "perplexities")
    levels = stacker.form.blocks - 1
    done = journal.restore([])
    for level in range(done, levels):
        counts = dict.fromkeys(stacker.modules, level + 1)
        config = stacker.draft.config | {
            "quantization_config": stacker.form.quantization_config(stacker.modules, [])
        }
        lower = StreamedModel(with_blocks(stacker.draft, config, counts), context.device)
        found = _raised(lower, stacker, windows, context.folder / "perplexities")
        journal.state[f"level-{level}"] = found.nan_to_num(nan=torch.inf)
        journal.commit(level + 1, [])
        context.progress("trying every linear", (level + 1) / levels)
    return torch.stack([journal.state[f"level-{level}"] for level in range(levels)])


@torch.no_grad()
def _raised(model: StreamedModel, stacker: Stacker, windows: Windows, folder: Path) -> torch.Tensor:
    """The perplexity with one more block in one linear, for every linear: float64 [linears]."""
    numbers = {name: number for number, name in enumerate(stacker.modules)}
    stream = model.stream(windows, folder / "prefix")
    branches = Branches(len(numbers), stream, folder / "branches")
    begun: list[int] = []
    for layer in model.walk(None, stream):
        rebuilt = _rebuild(layer)
        for number in begun:
            branches.advance(number, layer)
        for stack, linear in rebuilt:
            begun.append(numbers[stack.stored])
            with _one_more(stack, linear, stacker.form, stacker.draft):
                branches.begin(begun[-1], layer)
        stream.advance(layer)
        branches.flip()
    losses = torch.zeros(len(numbers), dtype=torch.float64, device=model.device)
    scored = scored_positions(windows)
    with model.head() as head:
        for number in range(len(numbers)):
            for window, tokens in enumerate(windows.tokens):
                at = scored[window].nonzero()[:, 0]
                logits = head(branches.read(number, window)[None]).logits[0, at].float()
                losses[number] += precise_losses(logits, tokens[at + 1].to(logits.device)).sum()
    return (losses.cpu() / scored.sum()).exp()


def _rebuild(layer: Layer) -> list[tuple[StackedLinear, nn.Linear]]:
    """Put dense linears in the place of a layer's stacks, whose weights all branches share.

    To multiply from the bits of a stack takes many times the work of a dense product, and hundreds of
    branches go through each layer.
    """
    found = []
    for path, stack in layer.linears.items():
        if isinstance(stack, StackedLinear):
            linear = nn.Linear(stack.in_features, stack.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(stack.dense(), requires_grad=False)
            linear.register_parameter("bias", None)
            if stack.bias is not None:
                linear.bias = nn.Parameter(stack.bias, requires_grad=False)
            layer.module.set_submodule(path, linear)
            found.append((stack, linear))
    return found


@contextmanager
def _one_more(
    stack: StackedLinear, linear: nn.Linear, form: StackFormat, checkpoint: Checkpoint
) -> Iterator[None]:
    """Give a rebuilt linear the next block of its stack for the length of a ``with`` block."""
    before, count = linear.weight.data, len(stack.blocks)
    stack.add(form.read(stack.stored, checkpoint, count, count + 1))
    linear.weight.data = before + stack.dense(slice(count, None))
    yield
    linear.weight.data = before
