"""Calibration text that the model writes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.calibration.text import generate
from compress.calibration.text.generate import GREEDY_LENGTHS, generated_windows, sample
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint
from compress.system.cache import CACHE_VARIABLE

EOS = 0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dense(tiny_decoder: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny_decoder(vocab_size=300))  # 43 of them are no token


def writer(dense: Checkpoint, room: int, batch_size: int = 64) -> generate._Writer:
    return generate._Writer(dense, load_tokenizer(dense.folder), [], room, 0, "cpu", batch_size)


def test_every_token_starts_a_sequence_but_special_and_unused_ones(dense: Checkpoint) -> None:
    tokenizer = load_tokenizer(dense.folder)
    tokenizer.add_tokens(["<unused3>", "<|reserved_special_token_9|>", "[unused1]", "unused"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    starts = generate._starts(tokenizer, seed=0)
    used = [*range(1, 257), tokenizer.convert_tokens_to_ids("unused")]

    assert sorted(starts) == [(token, length) for token in used for length in GREEDY_LENGTHS]
    assert starts != sorted(starts)
    assert starts == generate._starts(tokenizer, seed=0)
    assert starts != generate._starts(tokenizer, seed=1)


@torch.no_grad()
def test_sequences_begin_greedily_and_are_sampled_from_there(dense: Checkpoint) -> None:
    starts = [(7, 3), (7, 4), (7, 5), (200, 5), (31, 3)]
    model = compress.load(dense.folder)
    found = writer(dense, room=20).write(starts)
    greedy_everywhere = 0
    for (token, length), sequence in zip(starts, found, strict=True):
        assert sequence[0] == token
        assert EOS not in sequence[:-1]
        assert len(sequence) == 20 or sequence[-1] == EOS
        following = model(torch.tensor([sequence])).logits[0].argmax(-1).tolist()
        head = min(length, len(sequence))
        assert sequence[1:head] == following[: head - 1]
        greedy_everywhere += sequence[1:] == following[:-1]
    assert greedy_everywhere == 0
    assert found[0][:3] == found[1][:3]
    assert found[1][5:] != found[2][5:]  # each has random numbers of its own


def test_sampling_inverts_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    bounds = logits.softmax(-1)[0].cumsum(0)
    uniform = (torch.arange(10000) + 0.5).double() / 10000
    chosen = sample(logits.expand(10000, -1), uniform)
    assert torch.equal(chosen, (uniform[:, None] >= bounds).sum(-1))
    shares = torch.bincount(chosen, minlength=4) / 10000
    assert torch.allclose(shares.double(), logits.softmax(-1)[0], atol=2e-4)
    assert sample(logits, torch.tensor([1.0], dtype=torch.float64)).item() == 3


def test_same_windows_whatever_the_batch(dense: Checkpoint, cache: Path, monkeypatch) -> None:
    one = generated_windows(dense, 6, 24, seed=3)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "other"))
    other = generated_windows(dense, 6, 24, seed=3, batch_size=5)

    assert one.tokens.shape == (6, 24)
    assert bool(one.mask.all())
    assert one.sha256 == other.sha256
    assert one.describe()["sequences"] >= 6
    assert one.sha256 != generated_windows(dense, 6, 24, seed=4).sha256


def test_full_sequences_are_windows_and_short_ones_are_packed(dense: Checkpoint) -> None:
    # Where generation stops, a text ends: here at 11 of the 300 tokens.
    values = {"eos_token_id": [EOS, *range(60, 70)]}
    (dense.folder / "generation_config.json").write_text(json.dumps(values))
    windows = generated_windows(dense, 12, 24, seed=0)
    starts = generate._starts(load_tokenizer(dense.folder), 0)[: windows.settings["sequences"]]
    found = writer(dense, room=24).write(starts)
    whole = [sequence for sequence in found if len(sequence) == 24]
    packed = [token for sequence in found if len(sequence) < 24 for token in sequence]
    rows = windows.tokens.tolist()

    assert whole
    assert packed
    assert [row for row in rows if row in whole] == whole
    joined = [token for row in rows if row not in whole for token in row]
    assert joined == packed[: len(joined)]
    assert len(packed) - len(joined) < 24


def test_generation_goes_on_where_it_was_interrupted(
    dense: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "FILE", 4)
    expected = generated_windows(dense, 10, 24, seed=0)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "again"))
    write, calls = generate._Writer.write, []

    def interrupted(self, starts):
        calls.append(starts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, starts)

    monkeypatch.setattr(generate._Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generated_windows(dense, 10, 24, seed=0)
    files = sorted((cache / "again").rglob("*.safetensors"))
    assert [file.name for file in files] == ["000000.safetensors", "000001.safetensors"]
    found = generated_windows(dense, 10, 24, seed=0)

    assert found.sha256 == expected.sha256
    assert calls[3] == calls[2]  # nothing that was written is generated again
    count = len(calls)
    assert generated_windows(dense, 10, 24, seed=0).sha256 == expected.sha256
    assert len(calls) == count
    more = generated_windows(dense, 14, 24, seed=0)
    assert torch.equal(more.tokens[:10], expected.tokens)


def test_what_cannot_be_generated(
    tiny_decoder: Callable[..., Path], tiny_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_decoder()
    with pytest.raises(BadInput, match="larger seqlen"):
        generated_windows(Checkpoint.open(dense), 2, 6, seed=0)
    encoder = tiny_encoder("BertForSequenceClassification", "encoder")
    for model, section, words in (
        (encoder, {}, "An encoder cannot generate"),
        (dense, {"chat_template": True}, "no conversations"),
    ):
        recipe = {
            "model": str(model),
            "calibration": {"source": "generate", "nsamples": 2, "seqlen": 16, **section},
            "steps": [{"method": "gptq", "group_size": 16}],
        }
        with pytest.raises(BadInput, match=words):
            execute(parse_recipe(recipe), tmp_path / "out")


def test_any_method_can_be_calibrated_on_it(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {
        "model": str(tiny_decoder()),
        "calibration": {"source": "generate", "nsamples": 3, "seqlen": 24},
        "steps": [{"method": "gptq", "group_size": 32}],
    }
    lineage = execute(parse_recipe(recipe), tmp_path / "out")
    assert lineage.calibration["source"] == "generate"
    assert lineage.calibration["windows"] == 3
    assert lineage.calibration["temperature"] == 1.0
