"""Bits per module, and packed heads and embeddings, through the run to the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import compress
from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint
from compress.kernels.embedding import PackedEmbedding
from compress.kernels.linear import PackedLinear
from compress.quantization.formats import Formats
from compress.recipe import parse_recipe
from compress.reload import streamed_logits
from compress.run import execute

SIZE = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "llama-tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "gemma3": lambda: hf.Gemma3TextConfig(**GQA, head_dim=16, sliding_window=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZE, intermediate_size=96),
    "gpt2": lambda: hf.GPT2Config(**SIZE, bos_token_id=0, eos_token_id=0),
    "opt": lambda: hf.OPTConfig(**SIZE, ffn_dim=96, word_embed_proj_dim=32),
    "phi3": lambda: hf.Phi3Config(**GQA, pad_token_id=0),
}
MIXED = {"re:.*\\.0\\..*down": 8, "*.v_proj": 2, "model.layers.1.self_attn.v_proj": 3}
TOKENS = torch.arange(40).view(2, 20)


def make(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def quantize(model: Path, output: Path, **options: object) -> Path:
    step = {"method": "rtn", "group_size": 32, **options}
    execute(parse_recipe({"model": str(model), "steps": [step]}), output)
    return output


def dequantized(model: Path, packed: Path) -> hf.PreTrainedModel:
    """The dense model with what the packed tensors stand for."""
    dense, stored = hf.AutoModelForCausalLM.from_pretrained(model), Checkpoint.open(packed)
    formats = Formats(stored.config["quantization_config"])
    names = [name.removesuffix(".weight_packed") for name in stored.tensors if name.endswith("_packed")]
    for name in names:
        module = dense.get_output_embeddings() if name == "embed_out" else dense.get_submodule(name)
        kind = "Embedding" if isinstance(module, torch.nn.Embedding) else "Linear"
        value = formats.of(name, kind).read(name, stored.read).dequantize()
        module.weight.data = (value.T if "Conv1D" in type(module).__name__ else value).to(module.weight)
    return dense


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits.float()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())


def loads_with(folder: Path) -> str:
    return json.loads((folder / "compression.json").read_text())["result"]["loads_with"]


def test_the_last_pattern_that_matches_counts(tmp_path: Path) -> None:
    packed = quantize(make(tmp_path / "dense"), tmp_path / "packed", set=MIXED)
    model = compress.load(packed)
    bits = {name: part.bits for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    assert len(bits) == 14
    assert {name: width for name, width in bits.items() if width != 4} == {
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.1.self_attn.v_proj": 3,
    }
    report = json.loads((packed / "compression.json").read_text())["steps"][0]["details"]
    assert report["linears_by_bits"] == {"2": 1, "3": 1, "4": 11, "8": 1}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_mixed_bits_with_a_packed_head_and_embedding(
    name: str, symmetric: bool, tmp_path: Path
) -> None:
    dense = make(tmp_path / "dense", name)
    options = {"set": {"re:.*(down_proj|fc2|c_proj|4h_to_h)": 8}, "lm_head_bits": 8, "embedding_bits": 8}
    packed = quantize(dense, tmp_path / "packed", bits=3, symmetric=symmetric, **options)
    expected = logits(dequantized(dense, packed))
    model = compress.load(packed)
    assert {type(model.get_input_embeddings()), type(model.get_output_embeddings())} == {
        PackedEmbedding,
        PackedLinear,
    }
    assert close(logits(model), expected)
    windows = Windows(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), source="numbers")
    assert close(streamed_logits(Checkpoint.open(packed), windows), expected)
    assert loads_with(packed) == "compress-model only"
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 8)
