"""Every way of decoding gives what greedy decoding gives, whatever was removed from the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compress
from compress.anatomy import anatomy_of, layer_shapes
from compress.engine.pruned_config import PRUNED_FILE, mark_pruned, modeling_source
from compress.pruning.parts.width import pruned_parts

SLIDING = {"num_hidden_layers": 4, "sliding_window": 8}
WINDOWS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_hidden_layers": 4},
    "MistralForCausalLM": SLIDING,
    "Qwen2ForCausalLM": SLIDING | {"use_sliding_window": True, "max_window_layers": 2},
    "Gemma2ForCausalLM": SLIDING | {"head_dim": 16},
    "Gemma3ForCausalLM": SLIDING
    | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
PROMPT = (torch.arange(40).view(2, 20) % 17 + 5).repeat(
    1, 2
)  # repeats itself, so that prompt look-up has drafts
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


REMOVED = {"the first": [0], "every second": [0, 2], "the last": [3]}
"""Layers whose attention is removed. Some layers of the models with windows look at a window only."""


def without_attention(source: Path, folder: Path, removed: list[int]) -> Path:
    """A copy of a model without the attention of some layers, as BlockPruner writes it."""
    config = hf.AutoConfig.from_pretrained(source)
    section = {
        "parts": pruned_parts(anatomy_of(config), config),
        "layers": [
            {
                "num_attention_heads": 0 if index in removed else shape.num_attention_heads,
                "num_key_value_heads": 0 if index in removed else shape.num_key_value_heads,
                "intermediate_size": shape.intermediate_size,
                "biases": [],
            }
            for index, shape in enumerate(layer_shapes(config))
        ],
    }
    values = mark_pruned(json.loads((source / "config.json").read_text()), config, section)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / PRUNED_FILE).write_text(modeling_source(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


@pytest.mark.parametrize("removed", REMOVED)
@pytest.mark.parametrize("architecture", WINDOWS)
def test_decoding_after_attention_was_removed(
    architecture: str, removed: str, shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = shared_decoder(architecture, **WINDOWS[architecture])
    folder = without_attention(dense, tmp_path / "pruned", REMOVED[removed])
    whole = hf.AutoModelForCausalLM.from_pretrained(dense).eval()
    stock = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for model in (compress.load(folder), stock):
        check(model, whole)


@pytest.mark.parametrize("name", ["int4", "nested", "packed-embedding"])
def test_decoding_of_packed_models(name: str, artefact: Callable[..., Path]) -> None:
    model = compress.load(artefact(name), dtype="float32")
    check(model, compress.load(artefact("replaceme"), dtype="float32"))


@torch.no_grad()
def check(model: Any, assistant: Any) -> None:
    """All ways of decoding greedily agree with the model's logits, and the others run."""
    one, padded = PROMPT[:1], torch.nn.functional.pad(PROMPT, (3, 0))
    sequence = PROMPT
    for _ in range(GREEDY["max_new_tokens"]):
        after = model(sequence, use_cache=False).logits[:, -1]
        after[:, 0] = -torch.inf  # the end of the text, which is not to come yet
        sequence = torch.cat((sequence, after.argmax(-1, keepdim=True)), 1)
    ways = {
        "greedy": model.generate(PROMPT, **GREEDY),
        "static cache": model.generate(PROMPT, cache_implementation="static", disable_compile=True, **GREEDY),
        "look-up": model.generate(one, prompt_lookup_num_tokens=3, **GREEDY),
        "assisted": model.generate(one, assistant_model=assistant, **GREEDY),
        "streamed": model.generate(one, streamer=Streamer(), **GREEDY),
        "padded": model.generate(padded, attention_mask=(padded != 0).long(), **GREEDY)[:, 3:],
    }
    for way, found in ways.items():
        assert torch.equal(found, sequence[: len(found)]), way
    assisted = assistant.generate(one, assistant_model=model, **GREEDY)
    assert torch.equal(assisted, assistant.generate(one, **GREEDY))
    for settings in ({"num_beams": 3}, {"do_sample": True}, {"max_new_tokens": None, "max_length": 50}):
        assert model.generate(PROMPT, **GREEDY | settings).shape[0] == 2


class Streamer(hf.generation.BaseStreamer):
    """Takes the tokens as they come."""

    def put(self, value: torch.Tensor) -> None:
        assert value.numel()

    def end(self) -> None:
        pass
