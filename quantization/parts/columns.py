"""Rounding a weight column by column, so that later columns compensate the errors of earlier ones (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from compress.calibration.statistics.hessian import DAMPING, inverse_root
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, choose_grid, nearest_codes, storable
from compress.quantization.parts.clipping import clipped_grid
from compress.storage.formats.base import Format

COLUMNS_PER_UPDATE = 128
"""Columns that are rounded between two updates of all columns after them. Only speed depends on it."""


class HowToCompensate(Protocol):
    """The options that the rounding reads, see `compress.quantization.gptq.GPTQ`."""

    @property
    def damping(self) -> float | None: ...
    @property
    def clip(self) -> bool: ...
    @property
    def act_order(self) -> bool: ...
    @property
    def asymmetric_calibration(self) -> float: ...


@dataclass(frozen=True)
class _Usual:
    damping: float | None = None
    clip: bool = True
    act_order: bool = True
    asymmetric_calibration: float = 0.0


USUAL: HowToCompensate = _Usual()
"""GPTQ's defaults, for methods without such options."""


def round_by_columns(
    dense: torch.Tensor,
    hessian: torch.Tensor,
    options: HowToCompensate,
    form: Format,
    scale_dtype: torch.dtype,
    name: str,
    *,
    damping: float = DAMPING,
    difference: torch.Tensor | None = None,
) -> QuantizedWeight:
    """The algorithm for one weight.

    Args:
        dense: W [out, in].
        hessian: H without damping, float64 [in, in].
        options: how much is compensated, and in which order.
        form: the format of the weight, which gives its bits, group size and symmetry.
        scale_dtype: the dtype that scales are stored in.
        name: of the weight, for error messages.
        damping: added to the diagonal of H, as a share of its mean.
        difference: D (see `compensation`), float64 [in, in]; without it nothing but rounding is compensated.

    Raises:
        BadInput: there are NaN or infinite weights, or H is not positive even with damping.
    """
    width = dense.shape[1]
    size = width if form.group_size == CHANNEL else form.group_size
    order = torch.arange(width, device=dense.device)
    importance = hessian.diagonal() + damping * hessian.diagonal().mean()

    def grids(part: torch.Tensor, at: slice, name: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        if options.clip:
            return clipped_grid(part, importance[at], form, scale_dtype, name)
        grouped = part.float().reshape(len(part), -1, size)
        return choose_grid(grouped, form.bits, form.symmetric, scale_dtype, name)

    scales, zeros = grids(dense, slice(None), name)
    if options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_root(hessian, damping, order)
    if upper is None:
        raise BadInput(
            f"The inputs of '{name}' are too alike for GPTQ; use more calibration text or damping."
        )
    columns = dense.T[order].double()  # so that each column is contiguous
    if difference is not None:
        share = options.asymmetric_calibration
        columns += share * compensation(difference[order][:, order], upper).T @ columns

    steps, points = scales.double().T.contiguous(), zeros.double().T.contiguous()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=dense.device)
    places = order.tolist()  # nothing in the loop waits for the device
    for start in range(0, width, COLUMNS_PER_UPDATE):
        stop = min(start + COLUMNS_PER_UPDATE, width)
        errors = torch.zeros_like(columns[start:stop])
        for column in range(start, stop):
            group = places[column] // size
            if not options.act_order and column % size == 0:
                # All columns of the group as they are now, including those that are not yet updated.
                behind = columns[column : column + size].clone()
                if column + size > stop:
                    done = column - start
                    behind[stop - column :] -= upper[start:column, stop : column + size].T @ errors[:done]
                scale, zero = grids(behind.T, slice(column, column + size), None)
                scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
                steps[group], points[group] = scale[:, 0], zero[:, 0]
            code = nearest_codes(columns[column], steps[group], points[group], form.bits)
            codes[places[column]] = code
            rounded = (code - points[group]).mul_(steps[group])
            errors[column - start] = error = (columns[column] - rounded).div_(upper[column, column])
            columns[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    storable(scales.float(), scale_dtype, name)
    return QuantizedWeight(
        codes.T.contiguous(), scales, zeros.to(torch.uint8), form.bits, form.group_size, form.symmetric
    )


def compensation(difference: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """P of asymmetric calibration, float64 [in, in], strictly upper triangular.

    Once the columns up to q are rounded, the columns F after them have to compensate r = sum over j <= q of
    w_j (X~ - X)_j besides the errors of rounding: by least squares r X_F (X_F^T X_F)^-1. Column q's part of
    that is w_q P[q] with P[q, F] = D[q, F] (H_FF)^-1, where (H_FF)^-1 = U_FF^T U_FF, since U is triangular.
    w_q is the weight before any change, so every part can be added before the first column is rounded.

    Columns are in the order in which they are rounded.

    Args:
        difference: D = (X~ - X)^T X, float64 [in, in].
        upper: U.
    """
    return (difference @ upper.T).triu(1) @ upper
