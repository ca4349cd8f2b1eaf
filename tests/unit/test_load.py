from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import compress


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_keeps_the_dtype_it_is_stored_in(dtype: torch.dtype, tmp_path: Path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in compress.load(tmp_path).parameters()} == {dtype}
    assert compress.load(tmp_path).config.dtype == dtype
    assert {p.dtype for p in compress.load(tmp_path, dtype="float32").parameters()} == {torch.float32}


def test_load_stays_a_function_however_it_was_first_reached():
    code = "import compress; compress.load; from compress import load; assert compress.load is load"
    subprocess.run([sys.executable, "-c", code], check=True)
