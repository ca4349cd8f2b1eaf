"""Edits that survive rounding: the floor under the size of an edit, and training through the rounding.

Rounding a model to few bits undoes an edit that leaves a weight in its bin, so what was forgotten comes back
(arXiv:2410.16454). The grid that a recipe will use is known before it is used. So each edit can be held to
it:

- **training through the rounding**: every loss is the mean of that of the weights W and that of the weights
as
  they will be rounded, Q(W), whose gradient passes straight through (the idea of DurableUn,
  arXiv:2605.02196);
- **saliency**: only the weights are edited that matter most for what is to be forgotten and least for what is
  to be retained, by the ratio of the two diagonals of the Fisher information (the idea of MANSU,
  arXiv:2605.15138);
- **the floor**: in the end an edit changes the code of its weight, or it is taken back. With s and z of the
  group and q the code before, the least edit that does so ends beyond the nearer edge of the bin,
  s (q - z ± ½). The smallest and the largest weight of each group keep their values, and with them the grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, nearest_codes, number_of_groups, quantize_weight

MARGIN = 0.1
"""How far beyond the edge of its bin an edit ends, in steps of the grid: error feedback and other roundings
move weights by less than that where they move them at all."""

ENOUGH = 0.5
"""Share of the way to the edge that an edit must have gone to be carried over it. Others are taken back."""


@dataclass(frozen=True)
class Grid:
    """The grid that edits must survive: integer codes with a scale and a zero point for each group.

    Attributes:
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.
    """

    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """``int4:64`` or ``int4:channel``.

        Raises:
            BadInput: it is something else.
        """
        found = re.fullmatch(r"int([2-8]):(\d+|channel)", text)
        if found is None or found[2] == "0":
            raise BadInput(
                f"'{text}' is not a grid; write int and the bits (2 to 8), a colon and the group size, such "
                "as int4:64 or int4:channel."
            )
        return cls(int(found[1]), CHANNEL if found[2] == "channel" else int(found[2]))

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Make sure that the groups fit linears of the shapes [out, in].

        Raises:
            BadInput: the group size does not divide the inputs of one of them.
        """
        for name, (_, width) in linears.items():
            number_of_groups(width, self.group_size, name)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] as it will be: float32."""
        return quantize_weight(
            weight, self.bits, self.group_size, False, torch.float32, check=False
        ).dequantize()

    def floored(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """``after`` with every edit carried over the edge of its bin or taken back: float32 [out, in]."""
        held = quantize_weight(before, self.bits, self.group_size, False, torch.float32, check=False)
        out, groups = held.scales.shape
        old, new = (value.float().reshape(out, groups, -1) for value in (before, after))
        step, zero = held.scales.unsqueeze(-1), held.zeros.float().unsqueeze(-1)
        code = held.codes.view(out, groups, -1).float()
        low, high = old.amin(-1, keepdim=True), old.amax(-1, keepdim=True)
        new = torch.minimum(torch.maximum(new, low), high)
        up = new > old
        edge = step * (code - zero + torch.where(up, 0.5, -0.5))
        beyond = edge + step * torch.where(up, MARGIN, -MARGIN)
        gone = (new - old) / (edge - old).where(edge != old, torch.ones_like(edge))
        carried = torch.where(up, torch.maximum(new, beyond), torch.minimum(new, beyond))
        carried = torch.minimum(torch.maximum(carried, low), high)
        crosses = nearest_codes(carried, step, zero, self.bits) != code
        fixed = (old == low) | (old == high) | (new == old)
        edited = (gone >= ENOUGH) & crosses & ~fixed
        return torch.where(edited, carried, old).view(before.shape)

    def crossings(self, before: torch.Tensor, after: torch.Tensor) -> int:
        """The number of weights whose codes differ."""
        old, new = (
            quantize_weight(value, self.bits, self.group_size, False, torch.float32, check=False).codes
            for value in (before, after)
        )
        return int((old != new).sum())


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
            rounded = self.grid.rounded(weight)
            change = (rounded.T if self.transposed else rounded) - stored
        return stored + change


class Floor:
    """Holds the edits of a model's linears to a grid while it is trained.

    Args:
        grid: the one that the recipe will use.
        linears: stored name -> linear. All other weights stay as they are.

    Attributes:
        before: stored name -> the weight before the training.
    """

    def __init__(self, grid: Grid, linears: Mapping[str, nn.Module]) -> None:
        from transformers.pytorch_utils import Conv1D

        self.grid, self.linears = grid, linears
        self.transposed = {name: isinstance(linear, Conv1D) for name, linear in linears.items()}
        self.before = {
            name: linear.get_parameter("weight").detach().clone() for name, linear in linears.items()
        }
        self.roundings = []
        for name, linear in linears.items():
            rounding = Rounding(grid, self.transposed[name])
            parametrize.register_parametrization(linear, "weight", rounding, unsafe=True)
            self.roundings.append(rounding)

    def weights(self) -> dict[str, nn.Parameter]:
        """Stored name -> the weight that is trained."""
        return {
            name: linear.get_parameter("parametrizations.weight.original")
            for name, linear in self.linears.items()
        }

    def restrict(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Let the training change only the weights that the masks choose."""
        for name, weight in self.weights().items():
            mask = masks[name]
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)

    def through(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The mean of a loss with the weights as they are and with the weights as they will be rounded."""

        def both(*inputs: Any) -> torch.Tensor:
            plain = loss(*inputs)
            self._round(True)
            try:
                rounded = loss(*inputs)
            finally:
                self._round(False)
            return (plain + rounded) / 2

        return both

    def _round(self, on: bool) -> None:
        for rounding in self.roundings:
            rounding.on = on

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Put the floor under the edits, and give the linears plain weights again.

        Returns:
            Metadata: ``edits``, the number of weights that changed; ``crossed``, how many of them have
            another code on the grid; ``weights``, how many there are.
        """
        edits = crossed = total = 0
        for name, weight in self.weights().items():
            old, new = self.before[name], weight.detach()
            if self.transposed[name]:
                old, new = old.T, new.T
            floored = self.grid.floored(old, new)
            edits += int((floored != old).sum())
            crossed += self.grid.crossings(old, floored)
            total += old.numel()
            weight.copy_(floored.T if self.transposed[name] else floored)
            parametrize.remove_parametrizations(self.linears[name], "weight", leave_parametrized=True)
        return {"edits": edits, "crossed": crossed, "weights": total}


def fisher(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information: the mean squared gradient of a loss over batches.

    Args:
        weights: name -> parameter, of which it is computed.
        batches: of one example each, or the squares of sums are no sums of squares.
        loss: of the model and a batch, a scalar.

    Returns:
        name -> float32 of the weight's shape.
    """
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
        count += 1
    return {name: total / max(count, 1) for name, total in sums.items()}


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
