"""Compute the losses of a model without one more block, for all blocks at once.

Two ideas make this cheaper than a forward pass for each block, without changing which block is best:

Prefix reuse. Removing block b of layer l does not change what the layers before l compute. So one walk over
the layers carries the hidden states of the present model (the prefix), and from layer l on the hidden states
of one branch for each block of l. For L layers this takes about L^2 layer passes instead of 2 L^2.

A lower bound of the loss. The projection to the vocabulary is a large part of a small model, and every branch
would need all of it. Take a branch's logits z_v = w_v h, the set K of the tokens that the present model finds
most probable at this position (the next token is always among them), and the present model's distribution q
over all other tokens, with entropy H(q). By Jensen's inequality

    ln sum_v e^{z_v}  >=  ln( sum_{v in K} e^{z_v} + exp( h . sum_{v not in K} q_v w_v + H(q) ) )

which takes |K| + 1 dot products instead of one for every v. The nearer the branch is to the present model,
the less the two sides differ. The loss itself is computed only for the block with the least bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from compress.anatomy import weight
from compress.calibration.statistics.losses import precise_losses, scored_positions
from compress.engine.activations import device_limit, memory_limit
from compress.engine.branches import Branches
from compress.engine.head import Head
from compress.engine.stream import Stream, StreamedModel
from compress.engine.windows import Windows
from compress.pruning.parts.blocks import Block
from compress.pruning.parts.width import bias_of, skipped

CHUNK_ELEMENTS = 2**23  # float32 values in one chunk of the work behind the layers: 32 MiB
LIKELY_TOKENS = 256  # number of tokens in K
ROUNDING = 1e-4  # nats; bounds are lowered by this, so that rounding never lifts them above the loss


class BlockLosses:
    """The losses of a model without one more block, or bounds: means over a window's tokens, in nats.

    Attributes:
        blocks: the C candidates for removal.
        loss: float64 [C, N], for each block and window the loss where ``exact``, otherwise a lower bound.
        exact: bool [C, N].
        current: float64 [N], the losses of the present model on the windows measured so far.

    Args:
        model: the model before any removal.
        windows: the text; each window has a token to predict.
        removed: the blocks that are already removed in the present model.
        costs: candidate -> the number by which the rise of the loss is divided when candidates are compared.
        folder: takes the hidden states of a single window if they do not fit into memory.
        progress: told the share of all work on ``windows`` that is done.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Windows,
        removed: Sequence[Block],
        costs: Mapping[Block, float],
        folder: Path,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.model, self.windows, self.folder, self.progress = model, windows, folder, progress
        self.removed = set(removed)
        self.blocks = list(costs)
        self.costs = torch.tensor(list(costs.values()), dtype=torch.float64)
        self.loss = torch.zeros(len(costs), len(windows), dtype=torch.float64)
        self.exact = torch.zeros(len(costs), len(windows), dtype=torch.bool)
        self.current = torch.zeros(len(windows), dtype=torch.float64)

    @torch.no_grad()
    def best(self) -> int:
        """The index of the block with the least mean rise of the loss per cost, by exact losses."""
        everyone = list(range(len(self.blocks)))
        for chunk in self._chunks(torch.arange(len(self.windows)), len(everyone)):
            part = (int(chunk[0]), int(chunk[-1]) + 1)
            with self._through(everyone, chunk, part) as (prefix, branches), self.model.head() as head:
                if not self._bound(head, prefix, branches, chunk):
                    self._settle(head, branches, everyone, everyone, chunk)
                while not self.exact[(least := self._least(part[1])), chunk].all():
                    self._settle(head, branches, everyone, [least], chunk)
        while not self.exact[(least := self._least(len(self.windows)))].all():
            for chunk in self._chunks((~self.exact[least]).nonzero()[:, 0], 1):
                with self._through([least], chunk) as (_, branches), self.model.head() as head:
                    self._settle(head, branches, [least], [least], chunk)
        return least

    def _least(self, seen: int) -> int:
        """The first block with the least mean rise, or bound of it, over the first ``seen`` windows."""
        rises = (self.loss[:, :seen] - self.current[:seen]).mean(1) / self.costs
        return int(rises.argmin())

    def _chunks(self, rows: torch.Tensor, branches: int) -> tuple[torch.Tensor, ...]:
        """Split windows so that the hidden states of all branches fit into memory."""
        floats = branches * self.windows.tokens.shape[1] * self.model.config.hidden_size
        limit = max(memory_limit(), device_limit(self.model.device))
        return rows.split(max(1, limit // (4 * floats)))

    @contextmanager
    def _through(
        self, held: list[int], rows: torch.Tensor, part: tuple[int, int] | None = None
    ) -> Iterator[tuple[Stream, Branches]]:
        """Some windows behind the last layer of each branch in ``held``; and of the present model, if these
        windows are a ``part`` of the work: those from the first number to before the second."""
        stream = self.model.stream(self.windows.select(rows), self.folder / "prefix")
        branches = Branches(len(held), stream, self.folder / "branches")
        blocks = [self.blocks[index] for index in held]
        for layer in self.model.walk(None, stream):
            with ExitStack() as without:
                for block in self.removed:
                    if block.layer == layer.index:
                        without.enter_context(skipped(layer, self.model.anatomy, block.part))
                for number, block in enumerate(blocks):
                    if block.layer < layer.index:
                        branches.advance(number, layer)
                    elif block.layer == layer.index:
                        with skipped(layer, self.model.anatomy, block.part):
                            branches.begin(number, layer)
                if part or any(block.layer > layer.index for block in blocks):
                    stream.advance(layer)
            branches.flip()
            if part is not None:
                # Every layer begins new branches, which all the layers behind it have to advance.
                done = ((layer.index + 1) / self.model.num_layers) ** 2
                self.progress((part[0] + (part[1] - part[0]) * done) / len(self.windows))
        yield stream, branches

    def _bound(self, head: Head, prefix: Stream, branches: Branches, rows: torch.Tensor) -> bool:
        """Compute the losses of the present model, and bounds for the branches.

        Returns:
            False if there are no bounds because the model transforms its logits, for example by a soft cap.
        """
        _, length, width = prefix.hidden.shape
        group = max(1, CHUNK_ELEMENTS // (length * width))
        bounded = True
        for place, row in enumerate(rows.tolist()):
            at, targets = self._predictions(row)
            bound = Bound(head, prefix.hidden.read(place, place + 1)[0, at], targets)
            self.current[row] = bound.loss
            bounded = bounded and bound.holds
            for start in range(0, len(self.blocks) if bounded else 0, group):
                numbers = range(start, min(start + group, len(self.blocks)))
                hidden = torch.stack([branches.read(number, place)[at] for number in numbers])
                values = bound.of(head.features(hidden)) - ROUNDING
                self.loss[start : start + group, row] = values.nan_to_num(nan=math.inf)
        return bounded

    def _predictions(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions of a window whose loss counts, and the tokens that follow them: int64 [T] each."""
        at = scored_positions(self.windows)[row].nonzero()[:, 0]
        return at, self.windows.tokens[row, at + 1]

    def _settle(
        self, head: Head, branches: Branches, held: list[int], wanted: list[int], rows: torch.Tensor
    ) -> None:
        """Compute the exact losses of the blocks ``wanted``, of those whose branches are ``held``."""
        for index, (place, row) in itertools.product(wanted, enumerate(rows.tolist())):
            at, targets = self._predictions(row)
            hidden = branches.read(held.index(index), place)[at]
            losses = [
                precise_losses(head(part[None]).logits[0].float(), following.to(self.model.device)).cpu()
                for part, following in split_rows(head, hidden, targets)
            ]
            self.loss[index, row] = torch.cat(losses).mean().nan_to_num(nan=math.inf)
            self.exact[index, row] = True


class Bound:
    """Lower bounds of the losses of branches on one window (see above).

    Attributes:
        loss: the loss of the present model.
        holds: whether its logits are a projection of the features; otherwise there are no bounds.

    Args:
        head: head of the model, in memory.
        hidden: [T, D], hidden states of the present model behind the last layer.
        targets: int64 [T], the tokens to predict.
    """

    def __init__(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        self._weight, self._bias = weight(head.projection), bias_of(head.projection)
        parts = [self._look(head, *part) for part in split_rows(head, hidden, targets)]
        losses, self._likely, self._mean, self._entropy = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        self.loss = float(losses.mean())
        # For the present model, the bound equals the loss.
        self.holds = abs(float(self.of(head.features(hidden[None]))) - self.loss) < ROUNDING / 10

    def _look(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Losses [T], K [T, |K|] with the next token first, sum_v q_v w_v [T, D], H(q) [T], of positions."""
        logits = head(hidden[None]).logits[0].float()
        targets = targets.to(logits.device)
        losses = precise_losses(logits, targets)
        p = logits.softmax(1).scatter_(1, targets[:, None], 2.0)
        likely = p.topk(min(LIKELY_TOKENS, p.shape[1] - 1)).indices
        q = p.scatter_(1, likely, 0.0)
        mass = q.sum(1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        q.div_(mass.clamp(min=tiny))
        entropy = torch.special.entr(q).sum(1)
        if self._bias is not None:
            entropy += q @ self._bias
        return losses, likely, q @ self._weight, entropy.masked_fill(mass[:, 0] < tiny, -math.inf)

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """Bounds, up to rounding, for B branches: float64 [B] on the CPU.

        Args:
            features: [B, T, D], what each branch gives to the projection.
        """
        total = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        rows = max(1, CHUNK_ELEMENTS // 8 // (self._likely.shape[1] * features.shape[2]))
        for start in range(0, features.shape[1], rows):
            here = slice(start, start + rows)
            likely, part = self._likely[here], features[:, here].transpose(0, 1)
            known = part @ self._weight[likely].transpose(1, 2)
            if self._bias is not None:
                known += self._bias[likely][:, None]
            rest = (part @ self._mean[here, :, None])[..., 0] + self._entropy[here, None]
            total += (torch.logaddexp(known.logsumexp(2), rest) - known[..., 0]).double().sum(0)
        return (total / features.shape[1]).cpu()


def split_rows(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split positions into chunks whose logits fit into memory."""
    rows = max(1, CHUNK_ELEMENTS // len(weight(head.projection)))
    return zip(hidden.split(rows), targets.split(rows), strict=True)
