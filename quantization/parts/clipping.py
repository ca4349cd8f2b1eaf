"""Grids of groups of weights that are cut off where that makes the loss smaller."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.kernels.codes.integer import CHANNEL, choose_grid, nearest_codes
from compress.storage.formats.base import Format

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""A group is cut off at one of these shares of its largest magnitude."""

ELEMENTS_AT_ONCE = 1 << 22
"""Weights whose grids are chosen in one step. Only memory depends on it."""


def clip(
    grouped: torch.Tensor,
    form: Format,
    scale_dtype: torch.dtype,
    name: str | None,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the share of every group, and round to the nearest codes.

    Args:
        grouped: weights, float32 [a, b, size]; the last dimension is a group.
        form: gives bits and symmetry.
        scale_dtype, name: as in `choose_grid`.
        loss: the loss of each group [a, b], by how far its weights are off [a, b, size], which it may change.

    Returns:
        Codes, uint8 [a, b, size]; and [a, b]: scales in ``scale_dtype``, zero points as whole float32 values.

    Raises:
        BadInput: as `choose_grid`.
    """
    largest = grouped.abs().amax(-1, keepdim=True)
    best: list[torch.Tensor] = []
    for share in SHARES:
        # One side of a symmetric grid has one level more. Clamping could change which side that is.
        cut = grouped * share if form.symmetric else grouped.clamp(-share * largest, share * largest)
        scales, zeros = choose_grid(cut, form.bits, form.symmetric, scale_dtype, None if best else name)
        codes = nearest_codes(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), form.bits)
        off = (codes - zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).sub_(grouped)
        tried = [loss(off), codes.to(torch.uint8), scales, zeros]
        if best:
            better = tried[0] < best[0]
            tried = [
                torch.where(better if new.ndim == 2 else better.unsqueeze(-1), new, old)
                for new, old in zip(tried, best, strict=True)
            ]
        best = tried
    _, codes, scales, zeros = best
    return codes, scales, zeros


def clipped_grid(
    dense: torch.Tensor,
    importance: torch.Tensor,
    form: Format,
    scale_dtype: torch.dtype,
    name: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grids of a weight, cut off where the sum of squared errors, weighted by the inputs, is least.

    Args:
        dense: W [out, in].
        importance: weights of the inputs [in].
        form: gives bits, group size and symmetry; its groups may not be longer than the weight.
        scale_dtype, name: as in `choose_grid`.

    Returns:
        Scales in ``scale_dtype`` and zero points, whole numbers in float32, [out, groups].

    Raises:
        BadInput: as `choose_grid`.
    """
    size = dense.shape[1] if form.group_size == CHANNEL else form.group_size
    weights = importance.float().view(-1, size)
    found = [
        clip(
            rows.float().reshape(len(rows), -1, size),
            form,
            scale_dtype,
            name,
            lambda off: off.square_().mul_(weights).sum(-1),
        )
        for rows in dense.split(max(1, ELEMENTS_AT_ONCE // dense.shape[1]))
    ]
    return torch.cat([scales for _, scales, _ in found]), torch.cat([zeros for _, _, zeros in found])
