"""Keys and values in few bits: the same numbers with a cache and without, and a cache that is small."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, PreTrainedModel, StaticCache

import compress
from compress.engine import key_values
from compress.engine.key_values import (
    KEY,
    KeyValueSettings,
    QuantizedLayer,
    quantize_key_values,
)
from compress.errors import BadInput, CompressError
from compress.kernels.cpu.library import library
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

SLIDING = {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},  # a norm between projection and rotary embedding
    "Phi3ForCausalLM": {},  # one fused projection
    "GPTNeoXForCausalLM": {},  # fused and interleaved, part of a head rotated
    "Gemma3ForCausalLM": SLIDING,  # two rotary embeddings, windows of attention
    "MistralForCausalLM": {"head_dim": 16, "sliding_window": 6},
    "OPTForCausalLM": {},  # no rotary embedding
    "GPT2LMHeadModel": {},  # Conv1D
}
WAYS = [(scale, position) for scale in ("token", "head") for position in ("before-rope", "after-rope")]
TOKENS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quantized(shared_decoder: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    def make(architecture: str = "LlamaForCausalLM", **settings: Any) -> PreTrainedModel:
        folder = shared_decoder(architecture, **CASES[architecture])
        model = getattr(hf, architecture).from_pretrained(folder).eval()
        quantize_key_values(model, KeyValueSettings(**{"bits": 4, **settings}))
        return model

    return make


def cache_of(output: Any) -> Any:
    return output["cache" if "cache" in output.keys() else "past_key_values"]  # noqa: SIM118


def cache_name(model: PreTrainedModel) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def in_parts(model: PreTrainedModel, lengths: tuple[int, ...] = (9, 1, 3, 1)) -> tuple[torch.Tensor, Any]:
    """Logits of `TOKENS` given some at a time, and the cache."""
    logits, state = [], {}
    for part in TOKENS.split(lengths, dim=1):
        output = model(part, use_cache=True, **state)
        state = {cache_name(model): cache_of(output)}
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache_of(output)


@pytest.mark.parametrize("architecture", CASES)
def test_with_a_cache_and_without(quantized: Callable[..., PreTrainedModel], architecture: str) -> None:
    plain = getattr(hf, architecture).from_pretrained
    for scale, position in WAYS:
        model = quantized(architecture, scale=scale, position=position)
        whole = model(TOKENS, use_cache=False).logits
        parts, cache = in_parts(model)
        dense = plain(model.name_or_path).eval()(TOKENS, use_cache=False).logits

        assert all(isinstance(layer, QuantizedLayer) for layer in cache.layers)
        assert cache.get_seq_length() == TOKENS.shape[1]
        # Sums in another order may move a code of a later layer, so a few logits may differ by a step.
        off = (parts - whole).abs().amax(-1)
        assert (off < 1e-4).double().mean() > 0.8, (scale, position)
        assert off.max() < 0.1 * (whole - dense).abs().max(), (scale, position)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("scale", "position"), WAYS)
def test_what_the_cache_holds(
    quantized: Callable[..., PreTrainedModel], bits: int, scale: str, position: str
) -> None:
    model = quantized(bits=bits, scale=scale, position=position)
    _, cache = in_parts(model)
    layers, batch, length, heads, width = 2, 2, 14, 2, 16
    held = [
        tensor for layer in cache.layers for part in (layer.packed, layer.scales) for tensor in part.values()
    ]
    codes = 2 * layers * batch * length * heads * width * bits // 8
    scales = 2 * layers * batch * length * (heads if scale == "head" else 1) * 4
    rotations = 2 * length * width * 4 if position == "before-rope" else 0  # once, for all rows and layers
    rotated = [part for shared in cache.layers[0].rotations for part in shared.parts]

    assert {tensor.dtype for tensor in held} == {torch.int32, torch.float32}
    assert sum(tensor.nbytes for tensor in held) == codes + scales
    assert sum(part.nbytes for part in rotated) == rotations
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)
    full = 2 * layers * batch * length * heads * width * 4
    assert codes + scales + rotations < full * {4: 0.4, 8: 0.6}[bits]
    tensors = [
        name for layer in cache.layers for name, value in vars(layer).items() if torch.is_tensor(value)
    ]
    assert tensors == []


@pytest.mark.parametrize(("scale", "position"), WAYS)
def test_generation(quantized: Callable[..., PreTrainedModel], scale: str, position: str) -> None:
    model = quantized(scale=scale, position=position)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    for beams in (1, 3):
        with_cache = model.generate(TOKENS, num_beams=beams, return_dict_in_generate=True, **settings)
        without = model.generate(TOKENS, num_beams=beams, use_cache=False, **settings)
        assert torch.equal(with_cache.sequences, without)
        cache = cache_of(with_cache)
        assert isinstance(cache.layers[0], QuantizedLayer)
        assert cache.get_seq_length() == TOKENS.shape[1] + 7
    # Rows of different lengths: padding on the left moves positions, and each row keeps its own.
    padded = TOKENS.clone()
    padded[1, :5] = 0
    mask = (torch.arange(14) >= torch.tensor([[0], [5]])).long()
    for end in (14, 7):  # the attention of a short prompt is to the codes themselves
        both = model.generate(padded[:, :end], **{**settings, "attention_mask": mask[:, :end]})
        alone = model.generate(TOKENS[1:, 5:end], **{**settings, "attention_mask": mask[1:, 5:end]})
        assert torch.equal(both[1, end:], alone[0, end - 5 :])


def test_caches_of_the_user(quantized: Callable[..., PreTrainedModel]) -> None:
    model = quantized()
    plain = hf.AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    mine = DynamicCache(config=model.config)
    name = cache_name(model)
    with torch.no_grad():
        model(TOKENS, **{name: mine})
        assert isinstance(mine.layers[0], QuantizedLayer)
        foreign = cache_of(plain(TOKENS, use_cache=True))
        with pytest.raises(CompressError, match="empty DynamicCache"):
            model(TOKENS, **{name: foreign})
        with pytest.raises(CompressError, match="empty DynamicCache"):
            model(TOKENS, **{name: StaticCache(config=model.config, max_cache_len=20)})
        with pytest.raises(CompressError, match="cannot be rearranged"):
            mine.batch_repeat_interleave(2)
        mine.reset()
        assert mine.get_seq_length() == 0
        again = model(TOKENS, **{name: mine}).logits
    assert torch.allclose(again, model(TOKENS, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("position", ["before-rope", "after-rope"])
@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself(
    quantized: Callable[..., PreTrainedModel], position: str
) -> None:
    """As when many prompts begin alike."""
    model = quantized(position=position)
    name = cache_name(model)
    first = cache_of(model(TOKENS[:, :9], use_cache=True))
    second = copy.deepcopy(first)
    expected = model(TOKENS[:, 9:], **{name: first}).logits
    assert second.get_seq_length() == 9
    assert second.layers[0].block is first.layers[0].block  # no copy of the model's weights
    assert torch.equal(model(TOKENS[:, 9:], **{name: second}).logits, expected)


@pytest.mark.parametrize("position", ["before-rope", "after-rope"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_drafts_that_are_refused_leave_the_cache(
    quantized: Callable[..., PreTrainedModel], architecture: str, position: str
) -> None:
    model = quantized(architecture, position=position)
    prompt = torch.cat((TOKENS[:1], TOKENS[:1]), 1)  # a text that repeats itself, so that there are drafts
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    greedy = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **settings), greedy)


def test_a_model_whose_attention_was_pruned_away(shared_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense = shared_decoder(num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("Whole blocks of attention are gone, and the cache has fewer places. " * 20)
    recipe = {
        "model": str(dense),
        "calibration": {"source": str(text), "nsamples": 4, "seqlen": 32},
        "steps": [
            {"method": "blockpruner", "blocks": 3},
            {"method": "llm-qat", "steps": 0, "kv_scale": "head"},
        ],
    }
    lineage = execute(parse_recipe(recipe), tmp_path / "out")
    model = compress.load(tmp_path / "out")
    whole = model(TOKENS, use_cache=False).logits
    parts, cache = in_parts(model)

    assert "trust_remote_code" in lineage.result.loads_with
    assert 0 < len(cache.layers) < 4
    assert (parts - whole).abs().max() < 1e-4
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 17)


def test_a_section_that_is_none(shared_decoder: Callable[..., Path]) -> None:
    config = hf.LlamaConfig.from_pretrained(shared_decoder())
    assert KeyValueSettings.of(config) is None
    setattr(config, KEY, {"bits": 4, "scale": "head", "position": "after-rope"})
    assert KeyValueSettings.of(config) == KeyValueSettings(4, "head", "after-rope")
    for wrong in ({"bits": 5}, {"scale": "row"}, {"position": None}):
        setattr(config, KEY, {"bits": 4, "scale": "head", "position": "after-rope", **wrong})
        with pytest.raises(BadInput, match=KEY):
            KeyValueSettings.of(config)


@pytest.mark.parametrize(("scale", "position"), WAYS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel"])
def test_new_tokens_attend_to_codes(
    quantized: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    scale: str,
    position: str,
) -> None:
    """Where native kernels run, and with the same result as over dense keys and values."""
    model = quantized(architecture, scale=scale, position=position)
    attended: list[int] = []
    attend = key_values.CodedStates.attend

    def counted(self: Any, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        attended.append(query.shape[2])
        return attend(self, query, *rest)

    monkeypatch.setattr(key_values.CodedStates, "attend", counted)
    found, _ = in_parts(model)
    assert attended == ([] if library() is None else [1, 1, 3, 3, 1, 1])
    monkeypatch.setattr(key_values.AttentionBlock, "attends_to_codes", lambda *_: False)
    expected, _ = in_parts(model)
    off = (found - expected).abs().amax(-1)  # as above, a code of a later layer may move
    assert (off < 1e-4).double().mean() > 0.8
