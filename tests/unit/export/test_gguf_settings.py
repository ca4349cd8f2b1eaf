"""Settings of a model that llama.cpp does not compute are written so that it does, told, or refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compress
from compress.errors import BadInput
from compress.sources.find import find_model
from compress.storage.gguf.architectures import architecture_of, limits_of
from compress.storage.gguf.reader import GGUFFile

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 512,
    "long_factor": [1.0 + 0.3 * at for at in range(8)],
    "short_factor": [1.0 + 0.1 * at for at in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 257}


def metadata(name: str, **settings: Any) -> dict[str, Any]:
    config = getattr(hf, f"{name}Config")(**SIZES | settings)
    return architecture_of(config).metadata(config)


def test_phi3_with_a_long_context_says_how_much_longer_queries_become() -> None:
    lengths = {"max_position_embeddings": 2048, "original_max_position_embeddings": 512, "pad_token_id": 0}
    found = metadata("Phi3", rope_parameters=LONGROPE, **lengths)
    expected = math.sqrt(1 + math.log(2048 / 512) / math.log(512))
    assert found["rope.scaling.attn_factor"] == pytest.approx(expected)
    given = metadata("Phi3", rope_parameters=LONGROPE | {"attention_factor": 1.5}, **lengths)
    assert given["rope.scaling.attn_factor"] == 1.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Llama", {"rope_parameters": LONGROPE}, "by 'longrope'"),
        ("Llama", {"rope_parameters": YARN | {"beta_fast": 8}}, "its own 'beta_fast'"),
        ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "its own 'attention_factor'"),
        ("Llama", {"hidden_act": "relu"}, "'relu', and llama.cpp computes silu"),
        ("Gemma2", {"hidden_activation": "relu"}, "'relu', and llama.cpp computes gelu_pytorch_tanh"),
        ("GPTNeoX", {"hidden_act": "relu"}, "'relu', and llama.cpp computes gelu"),
        ("GPTNeoX", {"attention_bias": False}, "attention_bias = False"),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("Qwen3", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    metadata(name, **({"rope_parameters": YARN} if "beta" in message or "factor" in message else {}))
    with pytest.raises(BadInput, match=message):
        metadata(name, **settings)


def test_a_window_that_llama_cpp_ignores_is_told() -> None:
    config = hf.Phi3Config(sliding_window=2047, max_position_embeddings=4096)
    assert limits_of(config) == [
        "The model looks back 2,047 tokens at most, and llama.cpp without a limit, so on longer texts it "
        "answers differently."
    ]
    assert not limits_of(hf.Phi3Config(sliding_window=2047, max_position_embeddings=2047))
    assert not limits_of(hf.LlamaConfig())


@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (64, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (64, {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.3}),
        (16, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
    ids=["as in Llama 3.2", "odd", "one frequency between"],
)
def test_factors_of_a_llama_3_become_its_settings_again(
    tmp_path: Path,
    shared_decoder: Callable[..., Path],
    export: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    settings: dict[str, float],
) -> None:
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "original_max_position_embeddings": 50} | settings
    model, file = shared_decoder(head_dim=width, rope_parameters=rope), tmp_path / "model.gguf"
    export(model, "--format", "gguf", "--types", "F32", "--no-verify", "-o", file)
    folder = find_model(str(file)).folder
    found = json.loads((folder / "config.json").read_text())["rope_parameters"]
    for name in ("low_freq_factor", "high_freq_factor"):  # which count as shares of the original context
        assert found[name] / found["original_max_position_embeddings"] == pytest.approx(settings[name] / 50)
    if settings["low_freq_factor"] == 1.0:
        assert found == rope
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        wanted, read = (compress.load(each, kernel="reference")(tokens).logits for each in (model, folder))
    torch.testing.assert_close(read, wanted, atol=2e-5, rtol=1e-5)

    data, there = bytearray(file.read_bytes()), GGUFFile.open(file).tensors["rope_freqs.weight"]
    data[there.start : there.start + 4] = struct.pack("<f", 6.0)  # the fastest, slower than the next one
    file.write_bytes(data)
    with pytest.raises(BadInput, match="by factors for long contexts"):
        find_model(str(file))
