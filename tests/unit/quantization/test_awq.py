"""AWQ through the command line's way: packed, loaded again, and what it cannot scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compress
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint

# Settings, and the linears whose inputs cannot be scaled.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16}, []),
    "phi3": ("Phi3ForCausalLM", {}, []),
    "opt": ("OPTForCausalLM", {}, ["fc2"]),
    "opt, post-norm": (
        "OPTForCausalLM",
        {"do_layer_norm_before": False},
        ["self_attn.q_proj", "fc1", "fc2"],
    ),
    "gpt2": ("GPT2LMHeadModel", {}, ["mlp.c_proj"]),
}


@pytest.fixture(scope="session")
def dense(shared_decoder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda case: shared_decoder(CASES[case][0], dtype=torch.bfloat16, **CASES[case][1])


def quantized(folder: Path, output: Path, method: str, **options: object) -> Path:
    step = {"method": method, "bits": 3, "group_size": 16, "symmetric": False, **options}
    calibration = {"source": str(folder.parent / "text.txt"), "nsamples": 8, "seqlen": 64}
    execute(parse_recipe({"model": str(folder), "calibration": calibration, "steps": [step]}), output)
    return output


@torch.no_grad()
def error(folder: Path, other: Path) -> float:
    """Squared error of the logits on the text, as a share of their square."""
    text = (folder.parent / "text.txt").read_text()[:256]
    tokens = hf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    first, second = (compress.load(path, dtype="float32")(tokens).logits for path in (folder, other))
    return float((first - second).square().sum() / first.square().sum())


@pytest.mark.parametrize("case", CASES)
def test_it_is_nearer_than_rounding(case: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dense(case)
    nearest = error(folder, quantized(folder, tmp_path / "rtn", "rtn"))
    awq = quantized(folder, tmp_path / "awq", "awq")

    assert error(folder, awq) < 0.9 * nearest
    step = json.loads((awq / "compression.json").read_text())["steps"][0]
    assert step["details"]["unscaled"] == CASES[case][2]
    assert all(path in step["summary"] for path in CASES[case][2])


def test_a_block_that_is_not_there_is_not_called_unscaled(
    tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_decoder()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()  # so this block is the first to go
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    steps = [{"method": "blockpruner", "blocks": 1, "mode": "attention"}, {"method": "awq"}]
    calibration = {"source": str(folder.parent / "text.txt"), "nsamples": 2, "seqlen": 32}
    recipe = parse_recipe({"model": str(folder), "calibration": calibration, "steps": steps})
    step = execute(recipe, tmp_path / "out").steps[1]
    assert not any("layers.0.self_attn" in name for name in Checkpoint.open(tmp_path / "out").tensors)
    assert step.details["unscaled"] == []
    assert "no module can take up scales" not in step.summary


def test_what_is_kept_is_scaled_with_the_rest(dense: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dense("gemma3")
    kept = ["*.v_proj", "*.gate_proj", "*1.self_attn.o_proj", "*0.mlp.up_proj"]
    awq = quantized(folder, tmp_path / "awq", "awq", bits=8, ignore=kept)
    assert error(folder, awq) < 1e-3


def test_it_goes_on_where_it_was_killed(dense: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dense("phi3")
    whole = quantized(folder, tmp_path / "whole", "awq")

    step = {"method": "awq", "bits": 3, "group_size": 16, "symmetric": False}
    calibration = {"source": str(folder.parent / "text.txt"), "nsamples": 8, "seqlen": 64}
    recipe = parse_recipe({"model": str(folder), "calibration": calibration, "steps": [step]})

    def kill(text: str, share: float) -> None:
        if text.startswith("AWQ") and share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(recipe, tmp_path / "resumed", progress=kill)
    execute(recipe, tmp_path / "resumed", resume=True)
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
