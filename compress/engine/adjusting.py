"""Neuron adjustment at inference: pre-activations that look like forgotten text are mapped to retained text.

For a chosen neuron with Gaussians N_f = N(mu_f, sigma_f^2) of forgotten and N_r = N(mu_r, sigma_r^2) of
retained text (arXiv:2503.21730), a value x with N_f(x) >= N_r(x) becomes, with probability
N_f(x) / (N_f(x) + N_r(x)),

    x' = mu_r - sigma_r (x - mu_f) / sigma_f,

which is mapped to the distribution of retained text and mirrored at its mean.

The draw of a value is a hash of the seed, the layer, the neuron, the token and its position in the text. So
it does not depend on what else is in the batch, on padding, or on whether earlier tokens are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.passes import Pass
from compress.errors import CompressError

SMALLEST = 1e-6
"""The least standard deviation; smaller ones are set to it."""

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64 (Steele, Lea and Flood 2014)."""


class Measured(nn.Module):
    """Statistics of a layer that a model acts upon: buffers that stay float32 whatever dtype the model gets.

    Attributes:
        acting: whether the model acts upon them.
    """

    def __init__(self, shapes: dict[str, tuple[torch.dtype, int]], device: str | torch.device) -> None:
        super().__init__()
        for name, (dtype, size) in shapes.items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))
        self.acting = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Measured:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self


class Adjuster(Measured):
    """Adjusts the pre-activations of one layer.

    Args:
        index: of the layer.
        neurons: of the layer, I.
        seed: of the draws.
        now: the pass that is running.
        device: where the statistics are.

    Attributes:
        selected: bool [I], the neurons that are adjusted.
        forget_mean, forget_deviation, retain_mean, retain_deviation: mu_f, sigma_f, mu_r and sigma_r,
            float32 [I].
    """

    selected: Tensor
    forget_mean: Tensor
    forget_deviation: Tensor
    retain_mean: Tensor
    retain_deviation: Tensor

    STATISTICS = ("forget_mean", "forget_deviation", "retain_mean", "retain_deviation")

    def __init__(self, index: int, neurons: int, seed: int, now: Pass, device: str | torch.device) -> None:
        statistics = dict.fromkeys(self.STATISTICS, (torch.float32, neurons))
        super().__init__({"selected": (torch.bool, neurons), **statistics}, device)
        self.index, self.seed, self.now = index, seed, now

    def before_activation(self, activation: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the layer's activation: adjust what it is given."""
        if not self.acting:
            return None
        if self.now.tokens is None or self.now.positions is None:
            raise CompressError("This model adjusts neurons by the tokens it reads; give it input_ids.")
        return (self(inputs[0], self.now.tokens, self.now.positions), *inputs[1:])

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Adjust pre-activations.

        Args:
            x: [B, T, I], or the same flattened to [B T, I].
            tokens: ids [B, T].
            positions: number of real tokens before each in its text [B, T].

        Returns:
            As ``x``.
        """
        chosen = self.selected.nonzero()[:, 0]
        if not len(chosen):
            return x
        values = x[..., chosen]
        wide = values.to(torch.promote_types(x.dtype, torch.float32)).view(*tokens.shape, -1)
        statistics = [getattr(self, name)[chosen] for name in self.STATISTICS]
        drawn = uniform(self.seed, self.index, tokens[..., None], positions[..., None], chosen)
        replaced = drawn < probability(wide, *statistics)
        changed = torch.where(replaced, mirrored(wide, *statistics), wide).view(values.shape)
        return x.index_copy(-1, chosen, changed.to(x.dtype))


def log_density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The logarithm of the density of N(mean, deviation^2), without its constant."""
    return -0.5 * ((x - mean) / deviation).square() - deviation.log()


def probability(
    x: Tensor, forget_mean: Tensor, forget_deviation: Tensor, retain_mean: Tensor, retain_deviation: Tensor
) -> Tensor:
    """The probability that a value is replaced: N_f / (N_f + N_r) where N_f >= N_r, else 0.

    Args:
        x: [..., I].
        forget_mean, forget_deviation, retain_mean, retain_deviation: [I].
    """
    ratio = log_density(x, forget_mean, forget_deviation) - log_density(x, retain_mean, retain_deviation)
    return torch.where(ratio >= 0, ratio.sigmoid(), 0.0)


def mirrored(
    x: Tensor, forget_mean: Tensor, forget_deviation: Tensor, retain_mean: Tensor, retain_deviation: Tensor
) -> Tensor:
    """x' = mu_r - sigma_r (x - mu_f) / sigma_f; arguments as in `probability`."""
    return retain_mean - retain_deviation * (x - forget_mean) / forget_deviation


def uniform(seed: int, layer: int, tokens: Tensor, positions: Tensor, neurons: Tensor) -> Tensor:
    """A number in [0, 1) for every element: a hash of the arguments, and of nothing else.

    Args:
        seed, layer: of all elements.
        tokens, positions, neurons: int64, of shapes that broadcast.

    Returns:
        float32 of the broadcast shape, multiples of 2^-24.
    """
    state = torch.zeros((), dtype=torch.int64, device=tokens.device)
    for part in (seed, layer, positions, tokens, neurons):
        state = _mixed(state ^ part)
    return (state >> 40 & 0xFFFFFF).float() * 2.0**-24


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's step, in int64 arithmetic that wraps around."""
    state = state + _signed(GAMMA)
    state = (state ^ _shifted(state, 30)) * _signed(FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left."""
    return state >> bits & (1 << 64 - bits) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
