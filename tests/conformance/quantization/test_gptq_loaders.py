"""GPTQ checkpoints in stock transformers with optimum and gptqmodel, where those are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.kernels.codes.integer import quantize_weight
from compress.storage.formats.gptq import GPTQFormat

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
pytest.importorskip("optimum.gptq", reason="optimum is not installed")


def write(folder: Path, form: GPTQFormat, keep: str | None) -> tuple[Path, Path]:
    """A tiny model, dequantized and packed: two folders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    names = [name for name in names if name != "lm_head"]
    kept = [name for name in names if name == keep]
    packed = model.state_dict()
    for name in names:
        if name in kept:
            continue
        linear = model.get_submodule(name)
        weight = quantize_weight(
            linear.weight, form.bits, form.group_size, form.symmetric, torch.float16, name
        )
        linear.weight.data = weight.dequantize().half()
        del packed[f"{name}.weight"]
        packed |= form.tensors(name, weight)
    model.save_pretrained(folder / "dense")
    (folder / "packed").mkdir()
    save_file(packed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "dense" / "config.json").read_text())
    quantized = [name for name in names if name not in kept]
    values["quantization_config"] = form.quantization_config(quantized, kept, ["lm_head"])
    (folder / "packed" / "config.json").write_text(json.dumps(values))
    return folder / "dense", folder / "packed"


@pytest.mark.parametrize("keep", [None, "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", GPTQFormat.widths)
def test_stock_loaders_compute_the_same_logits(bits, symmetric, keep, tmp_path):
    dense, packed = write(tmp_path, GPTQFormat(bits, 32, symmetric), keep)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense)(tokens).logits.float()
        got = AutoModelForCausalLM.from_pretrained(packed)(tokens).logits.float()
    # Their 4-bit kernel for CPUs computes in bfloat16.
    tolerance = 1e-2 if bits == 4 else 2e-3
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())
