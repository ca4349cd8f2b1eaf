"""Rounding to the blocks of GGUF files with error feedback: GPTQ with grids of blocks."""

from __future__ import annotations

import torch

from compress.calibration.statistics.hessian import DAMPING, inverse_root
from compress.errors import BadInput
from compress.kernels.codes.gguf import BlockType
from compress.kernels.codes.gguf.fields import Fields

COLUMNS_PER_UPDATE = 128
"""Columns that are rounded between two updates of all columns after them. Only speed depends on it."""


def round_with_feedback(
    dense: torch.Tensor, hessian: torch.Tensor, kind: BlockType, name: str, *, damping: float = DAMPING
) -> Fields:
    """Round a weight to blocks; the columns that are not rounded yet compensate the error.

    The scales of all blocks are chosen first, by the diagonal of H. Then columns are rounded to the levels
    of their blocks, those with the largest inputs first, as in `compress.quantization.gptq`.

    Args:
        dense: W [out, in].
        hessian: H = X^T X of the inputs X, float64 [in, in].
        kind: a type with blocks.
        name: of the weight, for error messages.
        damping: added to the diagonal of H, as a share of its mean.

    Raises:
        BadInput: H is not positive even with damping, or as `BlockType.encode`.
    """
    diagonal = hessian.diagonal()
    fields = kind.round(dense, diagonal)
    order = diagonal.argsort(descending=True, stable=True)
    upper = inverse_root(hessian, damping, order)
    if upper is None:
        raise BadInput(f"The inputs of '{name}' are too alike for error feedback; use more calibration text.")
    upper = upper.float()
    step, offset = (None if part is None else _by_column(part, len(dense)) for part in fields.grid())
    assert step is not None
    inverse = step.reciprocal()
    inverse.masked_fill_(~inverse.isfinite(), 0)
    columns = dense.float().T[order].contiguous()
    levels = torch.empty_like(columns)
    places = order.tolist()
    for start in range(0, len(columns), COLUMNS_PER_UPDATE):
        stop = min(start + COLUMNS_PER_UPDATE, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for column in range(start, stop):
            group = places[column] // kind.group
            value = columns[column]
            shifted = value if offset is None else value - offset[group]
            level = kind.levels.nearest_(shifted * inverse[group])
            levels[places[column]] = level
            rounded = (
                level.mul(step[group]) if offset is None else torch.addcmul(offset[group], level, step[group])
            )
            errors[column - start] = error = (value - rounded).div_(upper[column, column])
            columns[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    codes = kind.levels.codes_of(levels).T.reshape(fields.codes.shape)
    return Fields(codes, fields.scale, fields.minimum, fields.group_scales, fields.group_minima)


def _by_column(values: torch.Tensor, out: int) -> torch.Tensor:
    """Numbers of groups [N, groups of a block] as [groups of a row, out]."""
    return values.reshape(out, -1).T.contiguous()
