"""The native description of a linear whose weight is dense."""

from __future__ import annotations

from torch import Tensor

from compress.kernels.cpu.linear import DENSE, TYPES, Linear


def dense_linear(weight: Tensor) -> Linear | None:
    """How the kernels see a dense weight [out, in], or None if they cannot read it where it is.

    It may be the transpose of a tensor (``Conv1D``). The description points to its memory, and has no bias.
    """
    rows, columns = weight.shape
    if weight.dtype not in TYPES or weight.device.type != "cpu" or type(weight.data) is not Tensor:
        return None
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        return None
    type_ = TYPES[weight.dtype]
    return Linear(
        kind=DENSE,
        rows=rows,
        columns=columns,
        group=1 if weight.is_contiguous() else rows,
        scale_type=type_,
        type=type_,
        blocks=1,
        codes=(weight.data_ptr(),),
    )
