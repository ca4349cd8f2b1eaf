"""The Hessian of a linear's squared error, and its inverse root."""

from __future__ import annotations

import torch

from compress.engine.activations import Activations
from compress.engine.stream import Seen

ROWS = 128
"""Rows of H that are multiplied, or inverted, in one step."""


class Hessian:
    """H = X^T X of a linear's inputs without padding and, if asked for, D = (X~ - X)^T X: float64 [in, in].

    Args:
        dense: X~ [N, S, in], the inputs of the same linear in the dense model; without them there is no D.

    Attributes:
        sum: H.
        difference: D.
        tokens: how many rows X has.
    """

    def __init__(self, dense: Activations | None = None) -> None:
        self.dense = dense
        self.sum: torch.Tensor | None = None
        self.difference: torch.Tensor | None = None
        self.tokens = 0

    def add(self, seen: Seen) -> None:
        """Products in float32, summed up in float64, some rows at a time: the whole takes much memory."""
        inputs, mask, start = seen.inputs, seen.mask, seen.start
        rows = inputs[mask].float()
        self.tokens += len(rows)
        if self.sum is None:
            self.sum = torch.zeros(2 * rows.shape[1:], dtype=torch.float64, device=rows.device)
            self.difference = None if self.dense is None else torch.zeros_like(self.sum)
        off = None
        if self.dense is not None:
            off = self.dense.read(start, start + len(inputs)).to(rows.device)[mask] - rows
        for at in range(0, rows.shape[1], ROWS):
            block = slice(at, at + ROWS)
            product = rows[:, block].T @ rows[:, at:]  # X^T X is symmetric
            self.sum[block, at:] += product
            self.sum[at + ROWS :, block] += product[:, ROWS:].T
            if off is not None:
                self.difference[block] += off[:, block].T @ rows


def inverse_root(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor | None:
    """U, upper triangular, with H^-1 = U^T U for columns in an order; None if H is not positive.

    H = R R^T with R upper triangular, so U = R^-1. With rows and columns back to front R is lower triangular,
    as Cholesky's factor is. H is as large as everything else here, so it is copied as seldom as can be.

    Args:
        hessian: H, float64 [in, in].
        diagonal: takes the place of H's own, [in].
        order: [in].
    """
    backwards = order.flip(0)
    reversed_hessian = hessian[backwards[:, None], backwards]
    reversed_hessian.diagonal().copy_(diagonal[backwards])
    lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
    del reversed_hessian
    return None if failed else invert_(lower).flip(0, 1)


def invert_(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix, in its place. By halves: [[A, 0], [B, C]] becomes
    [[A^-1, 0], [-C^-1 B A^-1, C^-1]]."""
    half = len(lower) // 2
    if half < ROWS:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    first, last = invert_(lower[:half, :half]), invert_(lower[half:, half:])
    lower[half:, :half] = -(last @ lower[half:, :half] @ first)
    return lower
