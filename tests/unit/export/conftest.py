"""What the tests of export share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compress
from compress.cli import cli


@pytest.fixture
def export() -> Callable[..., dict[str, Any]]:
    """What ``compress-model export --json`` prints, or the error that it raises."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        done = CliRunner().invoke(cli, ["export", *map(str, arguments), "--json", "-q"])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    return run


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that the test shares with no other."""
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pruned() -> Callable[..., Path]:
    """Carries out the steps on a model, calibrated on a little text, and returns the folder of the result."""

    def make(model: Path, folder: Path, *steps: dict[str, Any]) -> Path:
        text = {"source": str(model.parent / "text.txt"), "nsamples": 2, "seqlen": 32}
        compress.run({"model": str(model), "calibration": text, "steps": list(steps)}, folder)
        return folder

    return make


@pytest.fixture
def quantized(tmp_path: Path, shared_decoder: Callable[..., Path]) -> Callable[..., Path]:
    """The folder of a tiny model after one method of quantization."""

    def make(method: str, architecture: str = "LlamaForCausalLM", dtype: Any = None, **options: Any) -> Path:
        import torch

        settings = options.pop("settings", {})
        model = shared_decoder(architecture, dtype=dtype or torch.bfloat16, **settings)
        text = {"source": str(model.parent / "text.txt"), "nsamples": 2, "seqlen": 32}
        recipe = {"model": str(model), "calibration": text, "steps": [{"method": method, **options}]}
        folder = tmp_path / f"low-{len(list(tmp_path.iterdir()))}"
        compress.run(recipe, folder)
        return folder

    return make


def export_gguf(model: Path, output: Path, *options: str | Path) -> str:
    """What ``compress-model export --format gguf`` prints, or the error that it raises, without verifying."""
    arguments = ["export", model, "--format", "gguf", "-o", output, "--no-verify", "-q", *options]
    done = CliRunner().invoke(cli, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output
