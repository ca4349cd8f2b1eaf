"""Checks of what layers compute."""

from __future__ import annotations

from typing import Any

import torch

from compress.errors import CompressError


def first(output: Any) -> torch.Tensor:
    """The hidden states a layer returned: some architectures wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Mostly one pass: only a sum that is not asks for more."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Raises CompressError if ``hidden`` holds NaN or infinity."""
    if not all_finite(hidden):
        raise CompressError(
            f"{where} puts out NaN or infinite values: the model is broken or overflows there."
        )
