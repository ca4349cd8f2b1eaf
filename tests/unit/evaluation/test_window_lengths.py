"""Windows are no longer than a model has positions for, unless the user wants that; and models are alike."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import compress
from compress.calibration.text.prepare import FEWEST_TOKENS, prepare_calibration
from compress.calibration.text.settings import DEFAULT_SIZE, Calibration
from compress.engine.skeleton import longest_input, skeleton, window_length
from compress.errors import BadInput
from compress.evaluation import evaluate as evaluation
from compress.storage.checkpoint import Checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def longest(config: str, **settings: Any) -> int:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    if config not in ("GPT2Config", "OPTConfig"):
        sizes |= {"intermediate_size": 32}
    return longest_input(skeleton(getattr(hf, config)(**sizes | settings)))


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ("LlamaConfig", {"max_position_embeddings": 128}, 128),
        ("LlamaConfig", {"max_position_embeddings": 128, "rope_parameters": YARN}, 256),
        ("LlamaConfig", {"max_position_embeddings": 256, "rope_parameters": YARN}, 256),
        (
            "LlamaConfig",
            {"max_position_embeddings": 128, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            256,
        ),
        ("LlamaConfig", {"max_position_embeddings": 128, "rope_parameters": LLAMA3}, 128),
        ("MistralConfig", {"max_position_embeddings": 128, "sliding_window": 16}, 128),
        ("Gemma3TextConfig", {"max_position_embeddings": 128, "sliding_window": 16}, 128),
        ("GPT2Config", {"n_positions": 128}, 128),
        ("OPTConfig", {"max_position_embeddings": 128, "word_embed_proj_dim": 32, "ffn_dim": 32}, 128),
        ("RobertaConfig", {"max_position_embeddings": 130, "architectures": ["RobertaModel"]}, 128),
    ],
)
def test_how_many_tokens_a_model_has_positions_for(config: str, settings: dict[str, Any], expected: int):
    assert longest(config, **settings) == expected


def test_the_default_is_cut_and_a_wish_is_warned_about(
    tiny_decoder: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    model = skeleton(hf.LlamaConfig.from_pretrained(tiny_decoder(max_position_embeddings=64)))
    with caplog.at_level(logging.WARNING):
        assert window_length(model, None, 512) == 64
        assert window_length(model, None, 32) == 32
        assert window_length(model, 64, 512) == 64
        assert not caplog.records
        assert window_length(model, 65, 512) == 65
    assert "65 tokens are longer than the model was made for (64)" in caplog.text


def prepared(folder: Path, **settings: Any) -> Any:
    wanted = Calibration(source=str(folder.parent / "text.txt"), **settings)
    return prepare_calibration(wanted, 0, Checkpoint.open(folder), "cpu", lambda *_: None)


def test_calibration_windows_fit_the_model_by_default(tiny_decoder: Callable[..., Path]):
    short, long = (
        tiny_decoder(max_position_embeddings=64),
        tiny_decoder(name="long", max_position_embeddings=4096),
    )
    assert prepared(short, nsamples=2).tokens.shape == (2, 64)
    assert prepared(short, nsamples=2, seqlen=128).tokens.shape == (2, 128)
    assert prepared(long, nsamples=1).tokens.shape == (1, DEFAULT_SIZE.seqlen)


def test_calibration_on_next_to_nothing_is_refused(tiny_decoder: Callable[..., Path]):
    folder = tiny_decoder()
    assert prepared(folder, nsamples=1, seqlen=FEWEST_TOKENS).num_tokens == FEWEST_TOKENS
    with pytest.raises(BadInput, match=f"only {FEWEST_TOKENS - 1} tokens to calibrate on"):
        prepared(folder, nsamples=1, seqlen=FEWEST_TOKENS - 1)
    (folder.parent / "text.txt").write_text("a")
    with pytest.raises(BadInput, match="only 2 tokens to calibrate on"):
        prepared(folder, seqlen=2)


def evaluated(folder: Path, context: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: None)
    text = str(folder.parent / "text.txt")
    cards = compress.evaluate(str(folder), text=text, context=context, windows=2)
    return cards[0].protocol, " ".join(compress.compare(cards).caption)


def test_the_table_says_where_windows_are_too_long(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_decoder(max_position_embeddings=64)
    protocol, caption = evaluated(folder, None, monkeypatch)
    assert (protocol.context_tokens, protocol.positions) == (64, None)
    assert "made for" not in caption
    protocol, caption = evaluated(folder, 96, monkeypatch)
    assert (protocol.context_tokens, protocol.positions) == (96, 64)
    assert "The windows are longer than the 64 tokens that the dense model was made for" in caption


def test_another_vocabulary_is_noticed_before_anything_is_scored(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    dense, other = tiny_decoder(), tiny_decoder(name="other", vocab_size=300)
    monkeypatch.setattr(evaluation, "last_hidden", lambda *_: sys.exit("something was scored"))
    with pytest.raises(BadInput, match="a vocabulary of 300 tokens and the dense model one of 257"):
        compress.evaluate(str(other), baseline=str(dense), text=str(dense.parent / "text.txt"), context=32)


def test_another_tokenizer_is_noticed_before_anything_is_scored(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """Two vocabularies of one size can number their tokens differently."""
    dense, other = tiny_decoder(), tiny_decoder(name="other", rms_norm_eps=1e-5)
    file = other / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["t"], vocabulary["s"] = vocabulary["s"], vocabulary["t"]
    file.write_text(json.dumps(document))
    monkeypatch.setattr(evaluation, "last_hidden", lambda *_: sys.exit("something was scored"))
    options = {"baseline": str(dense), "text": str(dense.parent / "text.txt"), "context": 32}
    with pytest.raises(BadInput, match="does not number tokens as the dense model"):
        compress.evaluate(str(other), **options)
    for name in other.glob("tokenizer*"):
        name.unlink()
    with pytest.raises(SystemExit, match="something was scored"):  # its own tokenizer is not needed
        compress.evaluate(str(other), **options)
