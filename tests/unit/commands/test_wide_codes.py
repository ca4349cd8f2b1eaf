"""Codes of 5 and 6 bits from the command line to the logits of a reloaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress

from .common import RTN, Command, assert_one_sentence


@pytest.mark.parametrize("kind", [[], ["--symmetric"]])
def test_five_and_six_bits_lie_between_four_and_eight(
    kind: list[str], tiny: Path, tmp_path: Path, command: Command
) -> None:
    tokens = torch.arange(1, 49).view(2, 24)
    dense = compress.load(tiny, dtype="float32")(tokens).logits
    errors, sizes = [], []
    for bits in (4, 5, 6, 8):
        folder = tmp_path / str(bits)
        words = ["--bits", bits, "--lm-head-bits", bits, *kind, "-o", folder, "-q"]
        assert command("quantize", tiny, *RTN, *words).code == 0
        logits = compress.load(folder, dtype="float32")(tokens).logits
        errors.append(float((logits - dense).square().mean().sqrt() / dense.std()))
        sizes.append((folder / "model.safetensors").stat().st_size)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[1] / 4  # each bit halves the steps of the grid
    assert sizes == sorted(sizes)


def test_the_layout_of_gptq_has_no_five_bits(tiny: Path, tmp_path: Path, command: Command) -> None:
    ended = command("quantize", tiny, *RTN, "--bits", 5, "--format", "gptq", "-o", tmp_path / "out")
    assert_one_sentence(ended, 2, "the format gptq has 2, 3, 4 or 8 bits; use one of these, or the format")
