"""What it means that two results are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from compress.engine.logits import streamed_logits
from compress.engine.windows import Windows
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import Lineage

Result = tuple[Path, Lineage]

SAME_SHARE = 0.97
"""Least share of equal elements. Another order of the sums of float32 products may move a weight over the
middle between two codes, or a group to another clipping, but seldom."""

SAME_NUMBERS = 1e-3
"""Largest distance of equal floating-point numbers, as a share of the root mean square of their tensor."""

SAME_LOGITS = {False: 0.05, True: 0.3}
"""Largest distance of logits, as a share of their own spread. Training and searches magnify last bits."""


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without its section on quantization; measured numbers are rounded to four digits."""
    config = json.dumps({**checkpoint.config, "quantization_config": None})
    return json.loads(config, parse_float=lambda number: float(f"{float(number):.4g}"))


def assert_same_model(here: Result, there: Result, learned: bool = False) -> None:
    """Make sure that two results are one model, but for the rounding of their arithmetic.

    Args:
        here, there: folder and lineage of a result of the CPU, and of the device.
        learned: whether training or a search magnifies the rounding; then only the logits must be alike.
    """
    one, other = (Checkpoint.open(folder) for folder, _ in (here, there))
    assert other.tensors == one.tensors
    assert settings(other) == settings(one)
    assert there[1].device.startswith("cuda")
    for name in one.tensors:
        if not learned:
            assert_same_tensor(name, one.read(name), other.read(name))
    expected, found = logits(one), logits(other)
    distance = (found - expected).square().mean().sqrt() / expected.std()
    assert distance < SAME_LOGITS[learned]


def assert_same_tensor(name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Make sure that a tensor is nearly the same: whole numbers byte by byte, others by their distance."""
    if expected.dtype.is_floating_point and expected.dtype.itemsize > 1:
        reach = SAME_NUMBERS * expected.double().square().mean().sqrt()
        same = (found.double() - expected.double()).abs() <= reach
    else:
        same = torch.eq(*(tensor.contiguous().view(torch.uint8) for tensor in (expected, found)))
    assert same.double().mean() >= SAME_SHARE, name


def logits(model: Checkpoint) -> torch.Tensor:
    """The logits of a model for some random tokens, computed on the CPU: float32."""
    vocabulary = model.config["vocab_size"]
    tokens = torch.randint(vocabulary, (4, 24), generator=torch.Generator().manual_seed(1))
    return streamed_logits(model, Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), "random tokens"))
