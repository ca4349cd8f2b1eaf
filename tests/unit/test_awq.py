"""AWQ through the command line's way: packed, loaded again, and what it cannot scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import compress
from compress.recipe import parse_recipe
from compress.run import execute

SIZE = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GQA = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
CASES = {
    "gemma3": (lambda: hf.Gemma3TextConfig(**GQA, query_pre_attn_scalar=16), []),
    "phi3": (lambda: hf.Phi3Config(**GQA), []),
    "opt": (lambda: hf.OPTConfig(**SIZE, ffn_dim=96), ["fc2"]),
    "opt, post-norm": (
        lambda: hf.OPTConfig(**SIZE, ffn_dim=96, do_layer_norm_before=False),
        ["self_attn.q_proj", "fc1", "fc2"],
    ),
    "gpt2": (lambda: hf.GPT2Config(**SIZE), ["mlp.c_proj"]),
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def dense(folder: Path, case: str) -> Path:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CASES[case][0]())
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def quantized(folder: Path, output: Path, method: str, **options: object) -> Path:
    step = {"method": method, "bits": 3, "group_size": 16, "symmetric": False, **options}
    calibration = {"source": str(folder.parent / "text.txt"), "nsamples": 8, "seqlen": 64}
    execute(parse_recipe({"model": str(folder), "calibration": calibration, "steps": [step]}), output)
    return output


@torch.no_grad()
def error(folder: Path, other: Path) -> float:
    """Squared error of the logits on the text, as a share of their square."""
    tokens = hf.AutoTokenizer.from_pretrained(folder)(TEXT[:256], return_tensors="pt").input_ids
    first, second = (compress.load(path, dtype="float32")(tokens).logits for path in (folder, other))
    return float((first - second).square().sum() / first.square().sum())


@pytest.mark.parametrize("case", CASES)
def test_it_is_nearer_than_rounding(case: str, tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense", case)
    nearest = error(folder, quantized(folder, tmp_path / "rtn", "rtn"))
    awq = quantized(folder, tmp_path / "awq", "awq")

    assert error(folder, awq) < 0.9 * nearest
    step = json.loads((awq / "compression.json").read_text())["steps"][0]
    assert step["details"]["unscaled"] == CASES[case][1]
    assert all(path in step["summary"] for path in CASES[case][1])


def test_what_is_kept_is_scaled_with_the_rest(tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense", "gemma3")
    kept = ["*.v_proj", "*.gate_proj", "*1.self_attn.o_proj", "*0.mlp.up_proj"]
    awq = quantized(folder, tmp_path / "awq", "awq", bits=8, ignore=kept)
    assert error(folder, awq) < 1e-3


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense", "phi3")
    whole = quantized(folder, tmp_path / "whole", "awq")

    step = {"method": "awq", "bits": 3, "group_size": 16, "symmetric": False}
    calibration = {"source": str(tmp_path / "text.txt"), "nsamples": 8, "seqlen": 64}
    recipe = parse_recipe({"model": str(folder), "calibration": calibration, "steps": [step]})

    def kill(text: str, share: float) -> None:
        if text.startswith("AWQ") and share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(recipe, tmp_path / "resumed", progress=kill)
    execute(recipe, tmp_path / "resumed", resume=True)
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
