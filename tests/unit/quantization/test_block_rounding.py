"""Error feedback in blocks of GGUF files, measured on other inputs than those it was given."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.statistics.hessian import DAMPING, damping_of
from compress.kernels.codes.gguf import find_type
from compress.quantization.parts.block_rounding import round_with_feedback

COLUMNS = 256


def losses(kind: str, tokens: int) -> dict[str, float]:
    """Loss on inputs that were not seen, as a share of that without feedback."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dense, mixed = normal(64, COLUMNS).float(), normal(COLUMNS // 4, COLUMNS)

    def inputs(count: int) -> torch.Tensor:
        return normal(count, COLUMNS // 4) @ mixed + 4 * normal(count, COLUMNS)

    seen, other = (x.T @ x for x in (inputs(tokens), inputs(16 * COLUMNS)))
    form = find_type(kind)

    def loss(values: torch.Tensor) -> float:
        off = values.view(dense.shape).double() - dense
        return float((off @ other * off).sum())

    plain = loss(form.values(form.round(dense, seen.diagonal())))
    dampings = {"least": DAMPING, "ours": damping_of(COLUMNS, tokens)}
    return {
        name: loss(form.values(round_with_feedback(dense, seen, form, "w", damping=damping))) / plain
        for name, damping in dampings.items()
    }


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_0"])
def test_few_tokens_are_believed_less(kind: str) -> None:
    found = losses(kind, COLUMNS)
    assert found["ours"] < 0.85 * found["least"]


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_0"])
def test_many_tokens_are_believed(kind: str) -> None:
    found = losses(kind, 200 * COLUMNS)
    assert found["ours"] == found["least"] < 0.8
