"""Export of layers that differ to block_configs, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput

Export = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        ("LlamaForCausalLM", {"method": "flap", "ratio": 0.4, "compensate": "bias"}),
        ("Qwen2ForCausalLM", {"method": "blockpruner", "blocks": 3}),
    ],
)
def test_layers_that_differ_compute_the_same(
    tmp_path: Path,
    export: Export,
    pruned: Callable[..., Path],
    shared_decoder: Callable[..., Path],
    architecture: str,
    step: dict[str, Any],
) -> None:
    model = shared_decoder(architecture, dtype=torch.float32, num_hidden_layers=4, intermediate_size=320)
    source = pruned(model, tmp_path / "pruned", step)
    assert "pruned" in json.loads((source / "config.json").read_text())
    record = export(source, "--format", "nemotron-nas", "-o", tmp_path / "out")
    found = record["exported"]["verification"]
    assert found["difference"] < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    for entry in config["block_configs"]:
        assert entry["ffn"]["no_op"] or (2 * entry["ffn"]["ffn_mult"] * 64 / 3) % 256 == 0
        assert entry["ffn"]["no_op"] <= entry["attention"]["no_op"]  # llama.cpp would drop the attention
    assert not config["block_configs"][0]["attention"]["no_op"]
    there = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert abs(record["result"]["predicted_bytes"] - there) <= 0.02 * there


def test_query_norms_are_refused(tmp_path: Path, export: Export, shared_decoder: Callable[..., Path]) -> None:
    model = shared_decoder("Qwen3ForCausalLM", head_dim=16)
    with pytest.raises(BadInput, match="built like Llama"):
        export(model, "--format", "nemotron-nas", "-o", tmp_path / "out")
