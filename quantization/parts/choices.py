"""Choices of types: the best by the knapsack, and better ones by what is measured on held-out text."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.quantization.parts.divergence import Divergence
from compress.quantization.parts.knapsack import choose
from compress.quantization.parts.ladder import Ladder
from compress.quantization.parts.replaced import Replaced
from compress.quantization.parts.sensitivity import Sensitivities
from compress.system.files import write_atomically

log = logging.getLogger(__name__)

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
        folder: keeps what was measured, so that it is not measured again.
    """

    def __init__(self, model: StreamedModel, chooser: Chooser, windows: Windows, folder: Path) -> None:
        self.model, self.chooser, self.file = model, chooser, folder / "divergences.json"
        self._known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
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
        key = hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            replaced = Replaced.of(self.model, self.chooser.ladder, self.chooser.found, kinds)
            self._known[key] = self._divergence.of(replaced)
            write_atomically(self.file, json.dumps(self._known))
        return self._known[key]


def _key(choice: Mix) -> tuple[str, ...]:
    return tuple(choice.kinds.values())


def _distance(choice: Mix) -> float:
    assert choice.measured is not None
    return choice.measured


def tell(model: StreamedModel, label: str, share: float) -> None:
    """Tell the model's progress, if it has one."""
    if model.progress is not None:
        model.progress(label, share)
