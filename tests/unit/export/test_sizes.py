"""The size that a plan promises is the size on disk, within 2 %."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}


@pytest.mark.parametrize(
    "step",
    [
        {"method": "rtn", "bits": 3, "group_size": 64, "symmetric": False, "embedding_bits": 6},
        {"method": "rtn", "bits": 4, "group_size": 32, "format": "gptq"},
        {"method": "nf4"},
    ],
)
def test_a_run_writes_what_was_planned(
    tmp_path: Path, shared_decoder: Callable[..., Path], step: dict[str, Any]
) -> None:
    model = shared_decoder(dtype=torch.bfloat16, **SIZES)
    lineage = compress.run({"model": str(model), "steps": [step]}, tmp_path / "low")
    there = sum(file.stat().st_size for file in (tmp_path / "low").glob("*.safetensors"))
    assert abs(lineage.result.predicted_bytes - there) <= 0.02 * there


@pytest.mark.parametrize("target", ["huggingface", "gptq", "awq", "mlx"])
def test_an_export_is_as_large_as_its_dry_run_says(
    tmp_path: Path,
    export: Callable[..., dict[str, Any]],
    quantized: Callable[..., Path],
    target: str,
) -> None:
    source = quantized("rtn", bits=4, group_size=32, settings=SIZES)
    promised = export(source, "--format", target, "--dry-run")["bytes"]
    export(source, "--format", target, "-o", tmp_path / "out", "--no-verify")
    there = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert abs(promised - there) <= 0.02 * there
