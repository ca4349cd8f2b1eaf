"""Statistics of activations over tokens, collected batch by batch in float64.

Batches are merged by an exact formula (Chan, Golub and LeVeque 1983). So the size and order of the batches
change the results only by float64 rounding.
"""

from __future__ import annotations

import torch


class Moments:
    """Mean and variance of every channel.

    Args:
        channels: C.
        device: where the sums are.

    Attributes:
        count: tokens so far.
        mean: float64 [C].
        deviations: sum over tokens of (x - mean)^2, float64 [C].
    """

    def __init__(self, channels: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.deviations = torch.zeros_like(self.mean)

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens x [T, C]."""
        if not len(x):
            return
        x = x.double()
        mean = x.mean(0)
        deviations = (x - mean).square_().sum(0)
        total = self.count + len(x)
        shift = mean - self.mean
        self.deviations += deviations + shift.square() * (self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """Variance of the tokens so far (divided by their number, not by one less): float64 [C]."""
        return self.deviations / self.count

    @property
    def squared_norm(self) -> torch.Tensor:
        """Sum of x^2 over tokens: float64 [C]."""
        return self.deviations + self.count * self.mean.square()


class Products:
    """Sums over tokens of products of channels, for least squares with some of the channels as inputs.

    Args:
        channels: C.
        chosen: indices of the K input channels, int64 [K].
        centred: whether the mean is subtracted from every channel.
        device: where the sums are.

    Attributes:
        count: tokens so far.
        mean: of every channel, float64 [C].
        among: sum of (x_k - mean_k)(x_k - mean_k)^T over the chosen channels k, float64 [K, K]; of x_k x_k^T
            if not centred.
        across: the same with the channels that are not chosen as second factor, float64 [K, C - K].
    """

    def __init__(
        self, channels: int, chosen: torch.Tensor, centred: bool, device: str | torch.device = "cpu"
    ) -> None:
        self.count = 0
        self.centred = centred
        self.chosen = torch.zeros(channels, dtype=torch.bool, device=device)
        self.chosen[chosen] = True
        inputs = len(chosen)
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.among = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.across = torch.zeros(inputs, channels - inputs, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens x [T, C]."""
        if not len(x):
            return
        x = x.double()
        mean = x.mean(0)
        total, shift = self.count + len(x), mean - self.mean
        if self.centred:
            x = x - mean
            weight = self.count * len(x) / total
            inputs = shift[self.chosen]
            self.among.addr_(inputs, inputs, alpha=weight)
            self.across.addr_(inputs, shift[~self.chosen], alpha=weight)
        inputs = x[:, self.chosen].T
        self.among.addmm_(inputs, inputs.T)
        self.across.addmm_(inputs, x[:, ~self.chosen])
        self.mean += shift * (len(x) / total)
        self.count = total
