"""Losses of what ApiQ puts in the place of a linear's weight."""

from __future__ import annotations

from typing import Literal

import torch

from compress.calibration.statistics.hessian import Hessian
from compress.quantization.parts.clipped import ClippedLinear

ROWS = 256
"""Rows of weights that a loss is summed over, and of G that are in float32, in one step. Only memory depends
on this."""


class LinearLoss:
    """The mean over tokens and outputs of (X W^T - X_q Q^T)^2, where Q takes the place of W.

    With G = X_q^T X_q, D = (X - X_q)^T X_q and E = Q - W its sum is <E G, E> - 2 <W D, E> + constant. The
    constant is |X W^T|^2 - 2 <W D, W> - <W G, W>. The gradient of the sum by Q is 2 (E G - W D).

    Args:
        dense: W, float32 [out, in].
        hessian: G.
        crossed: W D, float64 [out, in]; it is overwritten.
        energy: |X W^T|^2.

    Attributes:
        resolution: losses below it are lost in the rounding of float32 products.
    """

    def __init__(self, dense: torch.Tensor, hessian: Hessian, crossed: torch.Tensor, energy: float) -> None:
        assert hessian.sum is not None  # it has seen the text
        self.dense, self.G, self.count = dense, hessian.sum, hessian.tokens * len(dense)
        self.resolution = 1e-6 * energy / self.count
        self.WD = crossed.div_(self.count)
        self.constant = energy / self.count
        parts = map(torch.Tensor.double, dense.split(ROWS))
        for rows, products in zip(parts, self.WD.split(ROWS), strict=True):
            self.constant -= float(((2 * products + (rows @ self.G).div_(self.count)) * rows).sum())

    def exact(self, whole: torch.Tensor) -> float:
        """The loss of Q, in float64."""
        total = self.WD.new_full((), self.constant)
        parts = (matrix.split(ROWS) for matrix in (whole, self.dense, self.WD))
        for rows, dense, products in zip(*parts, strict=True):
            off = rows.double() - dense
            total += (((off @ self.G).div_(self.count) - 2 * products) * off).sum()
        return float(total)

    def gradient(self, whole: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss of Q and its gradient [out, in], in float32, from one product of matrices."""
        off = whole - self.dense
        product = torch.empty_like(off)
        for columns, some in zip(product.split(ROWS, 1), self.G.split(ROWS), strict=True):
            columns.copy_(off @ some.float().div_(self.count).T)  # G is symmetric
        loss = self.WD.new_full((), self.constant)
        for rows, products, crossed in zip(*(m.split(ROWS) for m in (off, product, self.WD)), strict=True):
            loss += ((products - 2 * crossed.float()) * rows).sum(dtype=torch.float64)
            products.sub_(crossed.float())
        return float(loss), product.mul_(2)


def cross_products(dense: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """W D, float64 [out, in], of a weight W [out, in]. Only some rows of W are in float64 at once."""
    assert hessian.difference is not None  # it has seen the text, and was given the dense inputs
    found = torch.empty(dense.shape, dtype=torch.float64, device=dense.device)
    for rows, products in zip(dense.split(ROWS), found.split(ROWS), strict=True):
        torch.mm(rows.double(), hessian.difference, out=products)
    return found


class Saliency:
    """lambda * sum F_ij (M_ij - W_ij)^2 of a linear, where M is Ŵ or Q.

    Args:
        kind: "before_lora" if M is Ŵ, "after_lora" if it is Q.
        factor: lambda.
        fisher: F [out, in].
        dense: W [out, in].
    """

    def __init__(
        self,
        kind: Literal["before_lora", "after_lora"],
        factor: float,
        fisher: torch.Tensor,
        dense: torch.Tensor,
    ) -> None:
        self.kind, self.factor, self.fisher, self.dense = kind, factor, fisher, dense

    def of(self, rounded: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """M, which is one of Ŵ and Q [out, in]."""
        return whole if self.kind == "after_lora" else rounded

    @torch.no_grad()
    def gradient(self, matrix: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The term for M, and its gradient by M [out, in]."""
        off = matrix - self.dense
        slope = self.fisher * off
        value = self.factor * (slope * off).sum()
        return float(value), slope.mul_(2 * self.factor)

    def exact(self, linear: ClippedLinear) -> float:
        """The term for the linear as it would be stored."""
        after = self.kind == "after_lora"
        return self.gradient(linear.stored() if after else linear.rounded().dequantize().to(self.dense))[0]
