"""A linear with a low-bit grid that is clipped by learned bounds, and a low-rank adapter (ApiQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from compress.kernels.codes.integer import QuantizedWeight, grid_between, nearest_codes, number_of_groups

OPEN = 4.0
"""Logits of the clipping at the beginning: sigma(4) = 0.982 of the range is left."""

GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm. They are gradients of a loss relative to that of plain rounding."""

ADAPTER_DECAY = 0.1
"""Weight decay of A and B, as published. The clipping has none, since decay would pull it to one half."""


class ClippedLinear:
    """Ŵ + (alpha / r) B A, with Ŵ = s (q − z) between clipped extremes of each group of weights.

    With h = sigma(u) max(W_g, 0) and m = sigma(l) min(W_g, 0):

    - asymmetric: s = (h − m) / (2^b − 1), z = round(−m / s);
    - symmetric: s = −v / 2^(b−1), where v is h or m, whichever is larger in magnitude, and z = 2^(b−1);

    and q = clamp(round(W / s) + z, 0, 2^b − 1), where s is rounded to the dtype it is stored in. With u = l =
    ∞ this is `quantize_weight`. Gradients pass straight through rounding: W / s and s get the gradients that
    they would get without it, and z gets none.

    Args:
        weight: W [out, in], float32.
        rank, alpha: of the adapter.
        bits, group_size, symmetric, scale_dtype: of the grid, see `quantize_weight`.
        adapter_dtype: the dtype that A and B are stored in.
        generator: draws A uniformly from ±1 / sqrt(in) (Kaiming's initialisation, as in peft); B begins at 0.
        name: of the weight, for error messages.

    Attributes:
        u, l: logits of the clipping, float32 [out, groups].
        A, B: float32 [r, in] and [out, r].

    Raises:
        BadInput: as `quantize_weight`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        rank: int,
        alpha: float,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        generator: torch.Generator,
        name: str,
    ) -> None:
        out, width = weight.shape
        self.weight = weight
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.scale_dtype, self.adapter_dtype, self.name = scale_dtype, adapter_dtype, name
        self.scaling = alpha / rank
        self.grouped = weight.reshape(out, number_of_groups(width, group_size, name), -1)
        self.low = self.grouped.amin(-1).clamp(max=0)
        self.high = self.grouped.amax(-1).clamp(min=0)
        bound = width**-0.5
        first = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        self.u = torch.full_like(self.high, OPEN).requires_grad_()
        self.l = torch.full_like(self.low, OPEN).requires_grad_()
        self.A = first.to(weight).requires_grad_()
        self.B = weight.new_zeros(out, rank).requires_grad_()

    def quantized(self) -> torch.Tensor:
        """Ŵ [out, in]; it can be differentiated with respect to u and l."""
        exact, stored, zeros = self._grid()
        return _StraightThrough.apply(self.grouped, exact, stored.float(), zeros, self.bits).view_as(
            self.weight
        )

    def adapted(self, quantized: torch.Tensor) -> torch.Tensor:
        """``quantized`` + (alpha / r) B A [out, in]; it can be differentiated with respect to A and B."""
        return torch.addmm(quantized, self.B, self.A, alpha=self.scaling)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales before and after they are rounded to their dtype, and zero points: [out, groups] each."""
        high, low = torch.sigmoid(self.u) * self.high, torch.sigmoid(self.l) * self.low
        if self.symmetric:
            exact = torch.where(high > -low, -high, -low) / 2 ** (self.bits - 1)
        else:
            top = 2**self.bits - 1
            exact = high / top - low / top
        stored, zeros = grid_between(
            low.detach(), high.detach(), self.bits, self.symmetric, self.scale_dtype, self.name
        )
        return exact, stored, zeros

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        """Ŵ as it is stored."""
        _, scales, zeros = self._grid()
        codes = nearest_codes(self.grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), self.bits)
        return QuantizedWeight(
            codes=codes.view_as(self.weight).to(torch.uint8),
            scales=scales,
            zeros=zeros.to(torch.uint8),
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )

    @torch.no_grad()
    def adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are stored."""
        return self.A.detach().to(self.adapter_dtype), self.B.detach().to(self.adapter_dtype)

    @torch.no_grad()
    def stored(self) -> torch.Tensor:
        """The weight that the stored linear multiplies with: float32 [out, in]."""
        first, second = self.adapter()
        low_rank = second.float() @ first.float()
        return self.rounded().dequantize().to(low_rank).add_(low_rank, alpha=self.scaling)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of everything that is learned."""
        return {name: getattr(self, name).detach().clone() for name in ("u", "l", "A", "B")}

    def plain(self) -> dict[str, torch.Tensor]:
        """The `state` of plain rounding: nothing is clipped, and B is 0."""
        state = self.state()
        state["u"].fill_(torch.inf)
        state["l"].fill_(torch.inf)
        state["B"].zero_()
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set everything that is learned to a `state`."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


class _StraightThrough(torch.autograd.Function):
    """s (clamp(round(W / s) + z, 0, 2^b − 1) − z), with the derivative of rounding taken to be 1.

    The derivative by s is (q − z) − W / s where nothing is clamped, and q − z elsewhere. W gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, grouped: torch.Tensor, _: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """Scales come twice: the first, unrounded ones get the gradient, the second ones make the value."""
        scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        # In place, because each of these is as large as the weight.
        ratio = grouped / scales
        codes = ratio.round().add_(zeros)
        levels = codes.clamp(0, 2**bits - 1)
        inside = codes == levels
        levels.sub_(zeros)
        ctx.save_for_backward(ratio.mul_(inside).sub_(levels).neg_())
        return levels.mul_(scales)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None, (gradient * slope).sum(-1), None, None, None


def descent(
    linears: Sequence[ClippedLinear], steps: int, clip_learning_rate: float, learning_rate: float
) -> Callable[[], None]:
    """AdamW over some linears, with learning rates that fall linearly to 0.

    Args:
        linears: what is trained.
        steps: number of steps until the learning rates are 0.
        clip_learning_rate: of u and l.
        learning_rate: of A and B.

    Returns:
        A function that makes one step with the gradients there are, and clears them.
    """
    clipping = [values for linear in linears for values in (linear.u, linear.l)]
    adapters = [values for linear in linears for values in (linear.A, linear.B)]
    optimizer = torch.optim.AdamW(
        [
            {"params": clipping, "lr": clip_learning_rate, "weight_decay": 0.0},
            {"params": adapters, "lr": learning_rate, "weight_decay": ADAPTER_DECAY},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def step() -> None:
        # After a step that went too far gradients may overflow; then this step is left out.
        if clip_grad_norm_([*clipping, *adapters], GRADIENT_NORM).isfinite():
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step
