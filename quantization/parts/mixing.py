"""Choosing the type of every tensor by measured sensitivity, so that a model fits into given memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.quantization.parts.divergence import Divergence
from compress.quantization.parts.knapsack import choose
from compress.quantization.parts.ladder import Ladder
from compress.quantization.parts.replaced import Replaced
from compress.quantization.parts.sensitivity import Sensitivities, linear_sensitivities

log = logging.getLogger(__name__)

LENGTH = 128
"""Tokens in a window that is measured on: many short windows tell more than a few long ones."""

WINDOWS = 32
"""Number of windows that sensitivities are measured on."""

HELD_OUT = 8
"""Number of other windows that choices are compared on, and of those that tables are measured on."""

SWAPS = 8
"""Number of choices that are tried after the first."""

FACTOR = 2.0
"""In a swap, the losses of a group of tensors count this much more or less."""

MOST = 8.0
"""Losses are corrected by no more than this factor, since few tokens measured it."""


@dataclass(frozen=True)
class Mix:
    """The chosen types of the tensors of one model.

    Attributes:
        kinds: full name of a linear or a table -> its type.
        nbytes: bytes of all tensors of the model.
        predicted: the loss that these types are expected to cause, nats per token.
        measured: the divergence of the model with these types on held-out windows, nats per token; None
            without such windows.
        tried: number of choices that were measured.
    """

    kinds: dict[str, str]
    nbytes: int
    predicted: float
    measured: float | None = None
    tried: int = 0


def mix(
    model: StreamedModel,
    ladder: Ladder,
    memory: int,
    windows: Windows,
    seed: int,
    folder: Path,
    *,
    held_out: Windows | None = None,
) -> Mix:
    """Give every tensor one of its types, so that the loss is least and everything fits into ``memory``.

    The loss that a linear causes in a type is estimated from its residual after rounding and one backward
    pass; that of a table is measured. The sum is made least by an exact knapsack (`choose`). With held-out
    windows the choice is then corrected by what is measured there (`Corrections`).

    Args:
        model: the dense model.
        ladder: the types.
        memory: bytes that all tensors may take.
        windows: of text, to measure sensitivities on.
        seed: for drawing labels from the model.
        folder: with room for the Fisher information: 4 bytes per weight. It is empty, or another mixture of
            the same model, ladder and windows was made there, whose measurements are then used.
        held_out: other windows.

    Raises:
        BadInput: the model does not fit into ``memory`` in the smallest types, or a weight holds NaN.
    """
    smallest = ladder.fixed + sum(min(sizes.values()) for sizes in ladder.sizes.values())
    if smallest > memory:
        raise BadInput(
            f"In the smallest types the model takes {smallest / 1e6:,.1f} MB, more than the "
            f"{memory / 1e6:,.1f} MB allowed; allow more, or prune the model first."
        )
    if (found := Sensitivities.read(folder)) is None:
        found = linear_sensitivities(model, ladder, windows, seed, folder)
        measure_tables(model, ladder, windows.part(HELD_OUT, LENGTH), found)
        found.write(folder)
    chooser = Chooser(ladder, found, memory)
    if held_out is None:
        return chooser.choose()
    return Corrections(model, chooser, held_out).best()


def measure_tables(model: StreamedModel, ladder: Ladder, windows: Windows, found: Sensitivities) -> None:
    """Add the losses of what no backward pass was taken for, the tables: measured in one type after another.

    A table that serves as embedding and as head is measured in both roles at once.
    """
    tables = [name for name in ladder.sizes if name not in found.losses]
    if not tables:
        return
    divergence = Divergence(model, windows)
    wanted = [(name, kind) for name in tables for kind in ladder.sizes[name]]
    for done, (name, kind) in enumerate(wanted):
        tell(model, "measuring tables", done / len(wanted))
        if is_head(model, name) and name not in found.importance:
            found.importance[name] = divergence.head_importance()
        tried = {}
        for power in ladder.powers(name):
            found.powers[name, kind] = power
            tried[power] = divergence.of(Replaced.of(model, ladder, found, {name: kind}))
        found.powers[name, kind] = min(tried, key=tried.__getitem__)
        found.losses.setdefault(name, {})[kind] = min(tried.values())
    tell(model, "measuring tables", 1.0)


class Chooser:
    """Solves the knapsack for losses that are corrected, group by group.

    A group is all linears of one path in different layers, such as ``self_attn.q_proj``, or a table.

    Args:
        ladder: the types.
        found: the losses as they were measured.
        memory: bytes that all tensors may take.

    Attributes:
        factors: group -> what its losses are multiplied by, 1 at first.
    """

    def __init__(self, ladder: Ladder, found: Sensitivities, memory: int) -> None:
        self.ladder, self.found, self.memory = ladder, found, memory
        self.factors = dict.fromkeys((self.group(name) for name in ladder.sizes), 1.0)

    @staticmethod
    def group(name: str) -> str:
        """The group of a tensor."""
        return re.split(r"\.\d+\.", name)[-1]

    def choose(self, factors: Mapping[str, float] | None = None) -> Mix:
        """The best types if the losses of groups count ``factors`` times as much; without them, as corrected.

        The prediction is that of the corrected losses in any case.
        """
        weights = self.factors if factors is None else factors
        names = list(self.ladder.sizes)
        losses = [
            [weights[self.group(name)] * self.found.losses[name][kind] for kind in self.ladder.sizes[name]]
            for name in names
        ]
        sizes = [list(self.ladder.sizes[name].values()) for name in names]
        chosen = choose(losses, sizes, self.memory - self.ladder.fixed)
        assert chosen is not None  # the smallest types fit
        kinds = {
            name: list(self.ladder.sizes[name])[index] for name, index in zip(names, chosen, strict=True)
        }
        nbytes = self.ladder.fixed + sum(self.ladder.sizes[name][kind] for name, kind in kinds.items())
        return Mix(kinds, nbytes, self.predicted(kinds))

    def predicted(self, kinds: Mapping[str, str]) -> float:
        """The loss that tensors in these types are expected to cause together, nats per token."""
        losses = self.found.losses
        return sum(self.factors[self.group(name)] * losses[name][kind] for name, kind in kinds.items())


class Corrections:
    """Corrects a choice by what is measured on held-out windows.

    Estimated losses are of the second order, of each tensor alone, and from few tokens. So

    1. each group alone is put into the types that were chosen, and the divergence that is measured then
       corrects the losses of the group;
    2. with corrected losses, the types are chosen again;
    3. swaps are tried: the losses of a group count `FACTOR` times as much or as little, so that bits move
       into this group from where they are missed least, or out of it. A swap stays if the whole model is
       measured to be closer to the dense one.

    Every choice fits into the memory, since each is a solution of the knapsack.

    Args:
        model: the dense model.
        chooser: which chooses the types.
        windows: held out, which sensitivities were not measured on.
    """

    def __init__(self, model: StreamedModel, chooser: Chooser, windows: Windows) -> None:
        self.model, self.chooser = model, chooser
        self._divergence = Divergence(model, windows)
        self._seen: dict[tuple[str, ...], float] = {}  # types of all tensors -> the divergence of the model

    def best(self) -> Mix:
        """The best of all choices that were tried, with its prediction and measurement."""
        chooser, groups = self.chooser, list(self.chooser.factors)
        steps, first = len(groups) + 2 + SWAPS, chooser.choose()
        for number, group in enumerate(groups):
            tell(self.model, "measuring groups of tensors", number / steps)
            self._correct(group, first)
        # The prediction of the first choice is then with corrected losses, too.
        first = replace(first, predicted=chooser.predicted(first.kinds))
        best = min((self._whole(each, steps) for each in (first, chooser.choose())), key=_distance)
        weights, swaps = dict(chooser.factors), 0
        for group in sorted(groups, key=lambda group: -self._share(group, best)):
            for factor in (FACTOR, 1 / FACTOR):
                changed = weights | {group: weights[group] * factor}
                swapped = chooser.choose(changed)
                if swaps == SWAPS or _key(swapped) in self._seen:
                    continue
                swaps += 1
                if _distance(swapped := self._whole(swapped, steps)) < _distance(best):
                    best, weights = swapped, changed
        tell(self.model, "measuring choices", 1.0)
        return replace(best, tried=len(self._seen))

    def _correct(self, group: str, choice: Mix) -> None:
        """Let the losses of a group add up to what is measured with the group alone in the chosen types."""
        kinds = {name: kind for name, kind in choice.kinds.items() if self.chooser.group(name) == group}
        predicted, measured = self.chooser.predicted(kinds), self._measure(kinds)
        if predicted > 0 and measured > 0:
            self.chooser.factors[group] = min(max(measured / predicted, 1 / MOST), MOST)

    def _share(self, group: str, choice: Mix) -> float:
        return self.chooser.predicted(
            {name: kind for name, kind in choice.kinds.items() if self.chooser.group(name) == group}
        )

    def _whole(self, choice: Mix, steps: int) -> Mix:
        """The choice with its measurement, which is made once."""
        if (key := _key(choice)) not in self._seen:
            done = len(self.chooser.factors) + len(self._seen)
            tell(self.model, "measuring choices", done / steps)
            self._seen[key] = self._measure(choice.kinds)
            log.info(
                "%.1f MB: %.4f nats a token predicted, %.4f measured",
                choice.nbytes / 1e6,
                choice.predicted,
                self._seen[key],
            )
        return replace(choice, measured=self._seen[key])

    def _measure(self, kinds: Mapping[str, str]) -> float:
        return self._divergence.of(Replaced.of(self.model, self.chooser.ladder, self.chooser.found, kinds))


def _key(choice: Mix) -> tuple[str, ...]:
    return tuple(choice.kinds.values())


def _distance(choice: Mix) -> float:
    assert choice.measured is not None
    return choice.measured


def split(windows: Windows, decoder: bool) -> tuple[Windows, Windows | None]:
    """Windows to measure sensitivities on, and held-out ones: the last quarter of the windows, at least one.

    Both are cut into pieces of `LENGTH` tokens, of which `WINDOWS` and `HELD_OUT` are taken, first the
    beginnings of all windows. Inputs of an encoder keep their beginnings only, because they are wholes.

    Returns:
        The two; of a single window nothing is held out.
    """
    count = len(windows) // 4 or int(len(windows) > 1)
    first = torch.arange(len(windows)) < len(windows) - count
    measured = _pieces(windows.select(first), WINDOWS, decoder)
    return measured, _pieces(windows.select(~first), HELD_OUT, decoder) if count else None


def _pieces(windows: Windows, most: int, decoder: bool) -> Windows:
    """The first ``most`` pieces of `LENGTH` tokens. If all windows begin with one token, so do all pieces."""
    if not decoder or windows.tokens.shape[1] <= LENGTH:
        return windows.part(most, LENGTH)
    tokens, mask = windows.tokens, windows.mask
    kept = int(len(tokens) > 1 and bool((tokens[:, 0] == tokens[0, 0]).all()))  # a BOS token
    step = LENGTH - kept

    def cut(values: torch.Tensor) -> torch.Tensor:
        starts = range(kept, values.shape[1] - step + 1, step)
        pieces = [torch.cat([values[:, :kept], values[:, at : at + step]], 1) for at in starts]
        return torch.cat(pieces)

    cut_mask = cut(mask)
    real = cut_mask[:, kept:].any(1)
    return replace(windows, tokens=cut(tokens)[real][:most], mask=cut_mask[real][:most])


def tell(model: StreamedModel, label: str, share: float) -> None:
    """Tell the model's progress, if it has one."""
    if model.progress is not None:
        model.progress(label, share)


def is_head(model: StreamedModel, name: str) -> bool:
    """Whether a table is the projection to the vocabulary, perhaps among others."""
    return model.anatomy.head is not None and (model.anatomy.tied or name == model.anatomy.head)
