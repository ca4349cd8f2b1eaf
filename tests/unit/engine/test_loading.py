from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.errors import BadInput


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
    first = compress.load
    from compress import load

    assert callable(first)
    assert first is load is compress.load  # and no module, as a file of that name would be by now


@pytest.mark.parametrize("kind", ["Bert", "MPNet", "DistilBert", "Roberta"])
def test_a_sentence_encoder_loads_without_the_head_that_its_config_still_names(
    kind: str, tiny_encoder: Callable[..., Path]
):
    folder = tiny_encoder(f"{kind}Model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [f"{kind}ForMaskedLM"]}))
    tokens = torch.arange(2, 12)[None]
    with torch.inference_mode():
        expected = transformers.AutoModel.from_pretrained(folder)(tokens).last_hidden_state
        assert torch.allclose(compress.load(folder)(tokens).last_hidden_state, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", torch.float8_e5m2, "nn"])
def test_a_dtype_in_which_nothing_can_be_computed_is_refused(
    dtype: str | torch.dtype, shared_decoder: Callable[..., Path]
):
    with pytest.raises(BadInput, match="use float32, bfloat16 or float16"):
        compress.load(shared_decoder(), dtype=dtype)
