"""Edits that survive rounding: the floor under the size of an edit, and training through the rounding.

Rounding a model to few bits undoes an edit that leaves a weight in its bin, so what was forgotten comes back
(arXiv:2410.16454). The grid that a recipe will use is known before it is used. So edits can be held to it:

- **saliency**: only the weights are edited that matter most for what is to be forgotten and least for what is
  to be retained, by the ratio of the two diagonals of the Fisher information (the idea of MANSU,
  arXiv:2605.15138);
- **training through the rounding**: every other step is taken with the weights as they will be rounded, whose
  gradient passes straight through (the idea of DurableUn, arXiv:2605.02196);
- **the floor**: with s and z of the group, an edit that reached the bin of another code q ends in its middle,
  s (q - z), and not at its edge, s (q - z ± ½): other ways of rounding than to the nearest leave it there,
  and the model is edited by as much as the rounded model. Edits within a bin stay; rounding undoes them, but
  without them the model that is not rounded would remember. The smallest and the largest weight of each group
  are not edited, and with them the grid stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from compress.calibration.text.records import TokenSequence, collate
from compress.unlearning.parts.grid import Grid
from compress.unlearning.parts.losses import lengths, negative_log_likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from compress.anatomy import Anatomy
    from compress.method import StepContext


class Rounding(nn.Module):
    """A weight as it will be rounded, while ``on``; the gradient passes as if nothing were rounded.

    Args:
        grid: see `Grid`.
        transposed: the weight is stored as [in, out] (Conv1D).
    """

    def __init__(self, grid: Grid, transposed: bool) -> None:
        super().__init__()
        self.grid, self.transposed, self.on = grid, transposed, False

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return stored
        with torch.no_grad():
            weight = stored.T if self.transposed else stored
            rounded = self.grid.codes(weight).dequantize()
            change = (rounded.T if self.transposed else rounded) - stored
        return stored + change


class Floor:
    """Holds the edits of a model's linears to a grid while it is trained.

    Args:
        grid: the one that the recipe will use.
        linears: full name -> linear. All other weights stay as they are.

    Attributes:
        before: full name -> the weight before the training.
    """

    def __init__(self, grid: Grid, linears: Mapping[str, nn.Module]) -> None:
        self.grid, self.linears = grid, linears
        self.transposed = {name: isinstance(linear, Conv1D) for name, linear in linears.items()}
        self.before = {
            name: linear.get_parameter("weight").detach().clone() for name, linear in linears.items()
        }
        self.roundings = {name: Rounding(grid, self.transposed[name]) for name in linears}
        for name, rounding in self.roundings.items():
            parametrize.register_parametrization(linears[name], "weight", rounding, unsafe=True)

    def weights(self) -> dict[str, nn.Parameter]:
        """Full name -> the weight that is trained."""
        return {
            name: linear.get_parameter("parametrizations.weight.original")
            for name, linear in self.linears.items()
        }

    def movable(self, name: str) -> torch.Tensor:
        """Where a weight may change and its grid stays: bool, of the weight's shape."""
        weight = self.before[name]
        return self.grid.movable(weight.T).T if self.transposed[name] else self.grid.movable(weight)

    def restrict(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Let the training change only the weights that the masks choose."""
        for name, weight in self.weights().items():
            weight.register_hook(partial(torch.mul, masks[name]))

    def follow(self) -> TrainerCallback:
        """What rounds the weights in every other step of a training, from the second on."""
        from transformers import TrainerCallback

        roundings = self.roundings.values()

        class Follow(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                for rounding in roundings:
                    rounding.on = state.global_step % 2 == 1

        return Follow()

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Put the floor under the edits, and give the linears plain weights again.

        Returns:
            Metadata: ``edits``, the number of weights that changed; ``crossed``, how many weights have
            another code on the grid; ``weights``, how many there are.
        """
        edits = crossed = total = 0
        for name, weight in self.weights().items():
            self.roundings[name].on = False
            old, new = self.before[name], weight.detach()
            if self.transposed[name]:
                old, new = old.T, new.T
            settled = self.grid.settled(old, new)
            edits += int((settled != old).sum())
            crossed += self.grid.crossings(old, settled)
            total += old.numel()
            weight.copy_(settled.T if self.transposed[name] else settled)
            parametrize.remove_parametrizations(self.linears[name], "weight", leave_parametrized=True)
        return {"edits": edits, "crossed": crossed, "weights": total}


def floor_under(
    whole: PreTrainedModel,
    anatomy: Anatomy,
    grid: Grid,
    share: float,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    context: StepContext,
) -> Floor:
    """Hold to a grid those weights of a model's layers that are marked as trained; all others are frozen.

    Args:
        whole: the model.
        anatomy: of the model.
        grid: see `Grid`.
        share: of the weights of each linear that may be edited, over 0 to 1.
        forget, retain: what tells their saliency; of the latter as many as there are to forget.
        context: of the step.
    """
    linears = {
        f"{anatomy.layer_name(index)}.{path}": linear
        for index, layer in enumerate(whole.base_model.get_submodule(anatomy.layers).children())
        for path, linear in anatomy.linears(layer).items()
        if linear.get_parameter("weight").requires_grad
    }
    whole.requires_grad_(False)
    for linear in linears.values():
        linear.get_parameter("weight").requires_grad_(True)
    floor = Floor(grid, linears)
    chosen = torch.randperm(len(retain), generator=context.generator())[: len(forget)].tolist()
    wanted = fisher(whole, floor.weights(), forget, context, "asking what is to be forgotten")
    kept = fisher(
        whole, floor.weights(), [retain[index] for index in chosen], context, "asking what is retained"
    )
    masks = salient(wanted, kept, share)
    floor.restrict({name: masks[name] & floor.movable(name) for name in linears})
    return floor


def fisher(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    sequences: Sequence[TokenSequence],
    context: StepContext,
    label: str,
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information, the mean squared gradient of a sequence's mean loss.

    Args:
        model: predicts the next token.
        weights: name -> parameter of the model.
        sequences: each is one sample; without any, all is 0.
        context: of the step.
        label: text of the progress bar.

    Returns:
        name -> float32 of the weight's shape.
    """
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, sequence in enumerate(sequences, start=1):
        batch = {key: value.to(context.device) for key, value in collate([sequence], 0).items()}
        labels = batch.pop("labels")
        loss = negative_log_likelihood(model(**batch).logits, labels) / lengths(labels)
        gradients = torch.autograd.grad(loss.sum(), list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient, value=1 / len(sequences))
        context.progress(label, number / len(sequences))
    return sums


def salient(
    forget: Mapping[str, torch.Tensor], retain: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """The weights that matter most for what is forgotten and least for what is retained.

    Within each linear they are chosen by F_forget / (F_retain + mean F_retain), so that every linear can be
    edited and a weight that matters for neither is not chosen.

    Args:
        forget, retain: name -> diagonal of the Fisher information.
        share: of the weights of each linear that are chosen, over 0 to 1.

    Returns:
        name -> bool mask of the weight's shape.
    """
    masks = {}
    for name, wanted in forget.items():
        kept = retain[name]
        ratio = wanted / (kept + kept.mean()).clamp(min=torch.finfo(kept.dtype).tiny)
        count = max(1, round(share * ratio.numel()))
        least = ratio.flatten().kthvalue(ratio.numel() - count + 1).values
        masks[name] = ratio >= least
    return masks
