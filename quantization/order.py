"""Which linear of a model in stacks gets its next block first: one universal order (see `stacks`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.anatomy import weight
from compress.backward import Tape
from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint
from compress.kernels.stacked import StackedLinear
from compress.pruning.block_losses import Branches, next_token_losses, predicted
from compress.quantization.stacks import StackFormat, with_blocks
from compress.reload import first_output
from compress.stream import Journal, Layer, StreamedModel

if TYPE_CHECKING:
    from compress.quantization.stacking import Stacking, StackOptions
    from compress.run import Run

LENGTH = 128
"""Tokens of a window that the order is found on: many short windows tell more than a few long ones."""


def find_order(model: StreamedModel, stacking: Stacking, options: StackOptions, run: Run) -> list[int]:
    """The index of a linear for every step.

    Args:
        model: the dense one.
        stacking: with all blocks in its draft, on disk.
        options: say how.
        run: gives the text, the seed and the folder.
    """
    few = slice(options.order_windows)
    text = run.calibration
    types = text.token_types
    windows = replace(
        text,
        tokens=text.tokens[few, :LENGTH],
        mask=text.mask[few, :LENGTH],
        token_types=None if types is None else types[few, :LENGTH],
    )
    if options.importance == "perplexity":
        found = perplexities(stacking, windows, run)
        return [int(index) for level in found for index in level.argsort(stable=True)]
    losses = expected_losses(model, stacking, windows, run)
    form, infos = stacking.form, stacking.draft.tensors
    costs = [
        [sum(infos[key].nbytes for key in form.names(name, index)) for index in range(form.blocks)]
        for name in stacking.modules
    ]
    return by_gain([losses[name].tolist() for name in stacking.modules], costs)


def by_gain(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> list[int]:
    """The order in which blocks lower the total loss most for their bytes.

    The loss of a linear as a function of its bytes is replaced by its lower convex hull, because a block that
    gains little may have to come before one that gains much. On a hull the gain for each byte falls from
    block to block, so all blocks can be sorted by it.

    Args:
        losses: for every linear, that with 1, 2, ... blocks.
        costs: for every linear, the bytes of each block.

    Returns:
        The index of a linear for every block but the first ones.
    """
    ranked: list[tuple[float, int]] = []
    for linear, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        hull: list[tuple[float, float, int]] = []  # gain, bytes, blocks
        for index in range(1, len(loss)):
            segment = (loss[index - 1] - loss[index], cost[index], 1)
            while hull and segment[0] * hull[-1][1] > hull[-1][0] * segment[1]:
                segment = tuple(a + b for a, b in zip(hull.pop(), segment, strict=True))
            hull.append(segment)
        ranked += [(gain / size, linear) for gain, size, blocks in hull for _ in range(blocks)]
    return [linear for _, linear in sorted(ranked, key=lambda entry: -entry[0])]


def expected_losses(
    model: StreamedModel, stacking: Stacking, windows: Windows, run: Run
) -> dict[str, torch.Tensor]:
    """How much loss every linear causes alone with 1, 2, ... of its blocks, to second order.

    For the residual R = W - Ŵ of one linear, the divergence from the dense model is about
    1/2 vec(R)^T F vec(R) for each token, with the Fisher information F of W, because the gradient itself
    vanishes at the dense model. Its diagonal is the mean square of the gradient of the loss on labels drawn
    from the dense model, and one backward pass through it gives that:
    1/2 sum_ij (sum_windows G_ij^2) R_ij^2 / tokens, the first-order change by each entry, squared. What is
    left out, products of different entries, is as often positive as negative.

    Outputs that are no distributions over a vocabulary (encoders) take Gaussian labels around them: half the
    squared change of the output.

    Returns:
        Full name of a linear -> float64 [blocks], nats for each token.
    """
    anatomy, form = model.anatomy, stacking.form
    tokens = int(windows.mask.sum())
    stream = model.stream(windows, run.folder / "order" / "stream", batch_tokens=windows.tokens.shape[1])
    causal = anatomy.kind == "decoder" and anatomy.head is not None
    squares: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}

    def loss(output: object, start: int) -> torch.Tensor:
        values = first_output(output)
        generator = torch.Generator().manual_seed(run.seed + start)  # of the window, whatever the batch
        mask = windows.mask[start : start + 1].to(values.device)
        if causal:
            drawn = torch.multinomial(values[0].detach().float().softmax(-1).cpu(), 1, generator=generator)
            losses = nn.functional.cross_entropy(
                values[0].float(), drawn[:, 0].to(values.device), reduction="none"
            )
            return losses[mask[0]].sum()
        noise = torch.randn(values.shape, generator=generator).to(values)
        return (values * noise)[mask if values.shape[:2] == mask.shape else slice(None)].sum()

    def names(layer: Layer) -> Iterator[tuple[str, str]]:
        for path in layer.linears:
            stored = model.weights.find(f"{layer.name}.{path}.weight")
            if stacking.wants(stored):
                yield path, stored.removesuffix(".weight")

    @contextmanager
    def leaves(layer: Layer, _: int) -> Iterator[Mapping[str, torch.Tensor]]:
        weights = {path: layer.linears[path].weight for path, _ in names(layer)}
        for parameter in weights.values():
            parameter.requires_grad_(True)
        yield weights
        for parameter in weights.values():
            parameter.requires_grad_(False)

    def take(layer: Layer, start: int, gradients: Mapping[str, torch.Tensor]) -> None:
        for path, gradient in gradients.items():
            square = gradient.square()
            squares[path] = squares[path].add_(square) if path in squares else square
        if start + 1 < len(windows):
            return
        for path, name in names(layer):
            left = weight(layer.linears[path]).clone()
            fisher = squares.pop(path).T if anatomy.conv1d else squares.pop(path)
            stack = form.linear(left.shape[1], left.shape[0], form.read(name, stacking.draft)).to(
                model.device
            )
            losses = []
            for index in range(form.blocks):
                left -= stack.dense(slice(index, index + 1))
                losses.append((fisher * left.square()).sum(dtype=torch.float64).cpu() / (2 * tokens))
            found[name] = torch.stack(losses)
        run.progress("finding the order", 1 - layer.index / model.num_layers)

    tape = Tape(model, stream, run.folder / "order" / "tape")
    tape.forward()
    tape.differentiate(loss)
    tape.backward(leaves, take)
    return found


def perplexities(stacking: Stacking, windows: Windows, run: Run) -> torch.Tensor:
    """As published: with all linears at b blocks, the perplexity when each one alone gets its next block.

    All linears of a level go through the model together, each from its own layer on. NaN counts as infinite.

    Returns:
        float64 [blocks - 1, linears].
    """
    journal = Journal(run.folder / "perplexities")
    levels = stacking.form.blocks - 1
    done = journal.restore([])
    for level in range(done, levels):
        counts = dict.fromkeys(stacking.modules, level + 1)
        config = stacking.draft.config | {
            "quantization_config": stacking.form.quantization_config(stacking.modules, [])
        }
        lower = StreamedModel(with_blocks(stacking.draft, config, counts), run.device)
        found = _raised(lower, stacking, windows, run.folder / "perplexities")
        journal.state[f"level-{level}"] = found.nan_to_num(nan=torch.inf)
        journal.commit(level + 1, [])
        run.progress("trying every linear", (level + 1) / levels)
    return torch.stack([journal.state[f"level-{level}"] for level in range(levels)])


@torch.no_grad()
def _raised(model: StreamedModel, stacking: Stacking, windows: Windows, folder: Path) -> torch.Tensor:
    """Perplexities with one more block of each linear in turn: float64 [linears]."""
    numbers = {name: number for number, name in enumerate(stacking.modules)}
    stream = model.stream(windows, folder / "prefix")
    branches = Branches(len(numbers), stream, folder / "branches")
    begun: list[int] = []
    for layer in model.walk(None, stream):
        for number in begun:
            branches.advance(number, layer)
        for linear in layer.linears.values():
            if isinstance(linear, StackedLinear):
                begun.append(numbers[linear.stored])
                with _one_more(linear, stacking.form, stacking.draft):
                    branches.begin(begun[-1], layer)
        stream.advance(layer)
        branches.flip()
    losses = torch.zeros(len(numbers), dtype=torch.float64)
    scored = predicted(windows)
    with model.head() as head:
        for number in range(len(numbers)):
            for window, tokens in enumerate(windows.tokens):
                at = scored[window].nonzero()[:, 0]
                logits = head(branches.read(number, window)[None]).logits[0, at].float()
                losses[number] += next_token_losses(logits, tokens[at + 1].to(logits.device)).sum().cpu()
    return (losses / scored.sum()).exp()


@contextmanager
def _one_more(linear: StackedLinear, form: StackFormat, checkpoint: Checkpoint) -> Iterator[None]:
    count = len(linear.blocks)
    linear.blocks.extend(form.read(linear.stored, checkpoint, count, count + 1))
    yield
    del linear.blocks[count:]
