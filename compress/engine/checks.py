"""Checks that weights and computed values are finite."""

from __future__ import annotations

import torch

from compress.errors import CompressError


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A finite sum shows that all values are, in one pass without extra memory. Only where the sum is not finite
    (it may also overflow) is every value looked at.
    """
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Check what a layer or a gradient computed.

    Args:
        hidden: of any shape.
        where: begins the message, such as "Layer model.layers.3".

    Raises:
        CompressError: ``hidden`` holds NaN or infinity.
    """
    if not all_finite(hidden):
        raise CompressError(
            f"{where} puts out NaN or infinite values: the model is broken or overflows there."
        )
