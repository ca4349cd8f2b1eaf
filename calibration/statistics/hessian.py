"""The Hessian of the squared error of a linear's output, and the inverse root that GPTQ rounds with."""

from __future__ import annotations

import torch

from compress.engine.activations import Activations
from compress.engine.stream import Seen

DAMPING = 0.01
"""The least that is added to the diagonal of H, as a share of its mean."""

ROWS = 128
"""Rows of H that are computed, or inverted, in one step."""


class Hessian:
    """H = X^T X of the inputs X of a linear, without padding, and optionally D = (X~ - X)^T X.

    Args:
        dense: X~ [N, S, in], the inputs of the same linear in the dense model; without them there is no D.

    Attributes:
        sum: H, float64 [in, in]; None before the first batch.
        difference: D, float64 [in, in]; None before the first batch and without ``dense``.
        tokens: rows of X.
    """

    def __init__(self, dense: Activations | None = None) -> None:
        self.dense = dense
        self.sum: torch.Tensor | None = None
        self.difference: torch.Tensor | None = None
        self.tokens = 0

    def add(self, seen: Seen) -> None:
        """Add a batch. Products are float32 and are summed in float64, a few rows of H in each step, because
        a whole product would take as much memory as H."""
        rows = seen.real(seen.inputs).float()
        self.tokens += len(rows)
        if self.sum is None:
            self.sum = torch.zeros(2 * rows.shape[1:], dtype=torch.float64, device=rows.device)
            self.difference = None if self.dense is None else torch.zeros_like(self.sum)
        total, difference, off = self.sum, self.difference, None
        if self.dense is not None:
            off = seen.real(self.dense.read(seen.start, seen.start + len(seen.inputs))) - rows
        for at in range(0, rows.shape[1], ROWS):
            block = slice(at, at + ROWS)
            product = rows[:, block].T @ rows[:, at:]  # X^T X is symmetric
            total[block, at:] += product
            total[at + ROWS :, block] += product[:, ROWS:].T
            if off is not None and difference is not None:
                difference[block] += off[:, block].T @ rows


def damping_of(columns: int, tokens: int) -> float:
    """The damping for H of few tokens: the columns for each token, as a share of the mean of H's diagonal.

    Feedback lets later columns make up for an error along what inputs have in common. Few tokens have much in
    common by chance, so that a weight would be right on this text and wrong on others.

    Args:
        columns: of the weight.
        tokens: that H is a sum over.
    """
    return max(DAMPING, columns / tokens)


def inverse_root(hessian: torch.Tensor, damping: float, order: torch.Tensor) -> torch.Tensor | None:
    """The upper triangular U with (H + damping · mean(diag H) I)^-1 = U^T U, for columns in a given order.

    H = R R^T with R upper triangular, so U = R^-1. With rows and columns back to front R is lower triangular,
    so it is the Cholesky factor. H is large, so it is copied as seldom as possible.

    Args:
        hessian: H, float64 [in, in]. If it is zero, the inputs do not matter, and U is that of I.
        damping: share of the mean of H's diagonal that is added to the diagonal, above 0.
        order: of the columns, [in].

    Returns:
        U, or None if H is not positive even with damping.
    """
    backwards = order.flip(0)
    reversed_hessian = hessian[backwards[:, None], backwards]
    diagonal = hessian.diagonal() + damping * hessian.diagonal().mean()
    reversed_hessian.diagonal().copy_(torch.where(diagonal == 0, 1, diagonal)[backwards])
    lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
    del reversed_hessian
    return None if failed else invert_(lower).flip(0, 1)


def invert_(lower: torch.Tensor) -> torch.Tensor:
    """Invert a lower triangular matrix in place, and return it.

    It is done by halves: [[A, 0], [B, C]] becomes [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    half = len(lower) // 2
    if half < ROWS:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    first, last = invert_(lower[:half, :half]), invert_(lower[half:, half:])
    lower[half:, :half] = -(last @ lower[half:, :half] @ first)
    return lower
