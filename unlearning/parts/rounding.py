"""Training through the rounding: what is unlearned stays so when later steps round the weights.

Rounding a model to few bits undoes an edit that leaves a weight in its bin, so what was forgotten comes back
(arXiv:2410.16454). The grids that later steps will use are known before they are used. So the steps of a
training take turns: one with the weights as they are, and one for each grid with the weights as it will round
them, whose gradient passes as if nothing were rounded (straight-through estimation; the idea of DurableUn,
arXiv:2605.02196). So the losses are those of the model in each of these grids; what other roundings and
pruning do to it is for `compress-model audit` to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from compress.unlearning.parts.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from compress.anatomy import Anatomy
    from compress.engine.stream import StreamedModel


class Rounding(nn.Module):
    """A weight as ``grid`` rounds it, or as it is while that is None; gradients pass as if it were never set.

    Args:
        transposed: the weight is stored as [in, out] (Conv1D).
    """

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.grid: Grid | None = None

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            return stored
        with torch.no_grad():
            weight = stored.T if self.transposed else stored
            rounded = self.grid.codes(weight).dequantize()
            change = (rounded.T if self.transposed else rounded) - stored
        return stored + change


class Roundings:
    """Rounds the weights of a model's linears while it is trained, in turns.

    Args:
        grids: those of later steps, as in ``--survive``; without any, nothing is rounded.
        linears: full name -> linear.
    """

    def __init__(self, grids: Sequence[str], linears: Mapping[str, nn.Module]) -> None:
        self.grids = {text: Grid.parse(text) for text in grids}
        self.turns = [None, *self.grids.values()]
        self.linears = linears
        self.roundings = [Rounding(isinstance(linear, Conv1D)) for linear in linears.values()]
        for linear, rounding in zip(linears.values(), self.roundings, strict=True):
            parametrize.register_parametrization(linear, "weight", rounding, unsafe=True)

    @classmethod
    def of(cls, whole: PreTrainedModel, anatomy: Anatomy, grids: Sequence[str]) -> Self:
        """Round those linears of a model's layers that are marked as trained, and train nothing else.

        Tables and norms stay as they are, since later steps store them otherwise. Without grids the model is
        left alone.
        """
        if not grids:
            return cls((), {})
        linears = {
            f"{anatomy.layer_name(index)}.{path}": linear
            for index, layer in enumerate(whole.base_model.get_submodule(anatomy.layers).children())
            for path, linear in anatomy.linears(layer).items()
            if linear.get_parameter("weight").requires_grad
        }
        whole.requires_grad_(False)
        for linear in linears.values():
            linear.get_parameter("weight").requires_grad_(True)
        return cls(grids, linears)

    def turn(self, step: int) -> None:
        """Round as the step of that number, from 0 on, is taken: with no grid, the first, the second, ..."""
        for rounding in self.roundings:
            rounding.grid = self.turns[step % len(self.turns)]

    def follow(self) -> TrainerCallback:
        """What takes turns in a training."""
        from transformers import TrainerCallback

        roundings = self

        class Follow(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                roundings.turn(state.global_step)

        return Follow()

    def finish(self, model: StreamedModel) -> dict[str, int]:
        """Give the linears plain weights again, as they are trained and not as they are rounded.

        Args:
            model: what was trained, as it is stored.

        Returns:
            How many weights have another code than before the training: grid -> number.
        """
        self.turn(0)
        counts = dict.fromkeys(self.grids, 0)
        for (name, linear), rounding in zip(self.linears.items(), self.roundings, strict=True):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            stored = model.weights.find(f"{name}.weight")
            assert stored is not None  # the model was read from there
            pair = [model.checkpoint.read(stored), linear.get_parameter("weight").detach().cpu()]
            before, after = ((each.T if rounding.transposed else each).float() for each in pair)
            for text, grid in self.grids.items():
                counts[text] += grid.crossings(before, after)
        return counts
