"""Names of tensors unlike those of the class, and heads that are not what the config says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compress
from compress.engine.opening import open_checkpoint
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint

from ...oddities import WEIGHTS, add_tensors, change_json, rename_tensors

TOKENS = torch.arange(2, 20)[None]

# Class -> the prefix that is missing in its files, or that they have and it lacks.
PREFIXES = {
    "Qwen3ForCausalLM": "model.",
    "LlamaForCausalLM": "model.",
    "LlamaModel": "model.",
    "GPT2LMHeadModel": "transformer.",
    "GPTNeoXForCausalLM": "gpt_neox.",
    "OPTForCausalLM": "model.",
}
ENCODERS = {
    "MPNetModel": "mpnet.",
    "BertForSequenceClassification": "bert.",
    "BertForMaskedLM": "bert.",
    "RobertaModel": "roberta.",
    "DistilBertForTokenClassification": "distilbert.",
}


@pytest.fixture
def made(tiny_decoder: Callable[..., Path], tiny_encoder: Callable[..., Path]) -> Callable[..., Path]:
    def make(architecture: str, **settings: Any) -> Path:
        tiny = tiny_decoder if architecture in PREFIXES else tiny_encoder
        return tiny(architecture, **settings)

    return make


@torch.no_grad()
def in_transformers(architecture: str, folder: Path) -> torch.Tensor:
    return getattr(hf, architecture).from_pretrained(folder, dtype=torch.float32).eval()(TOKENS)[0]


@torch.no_grad()
def in_compress(folder: Path) -> torch.Tensor:
    return compress.load(folder, dtype="float32")(TOKENS)[0]


def quantized(folder: Path, **options: Any) -> Path:
    output = folder.with_name("quantized")
    step = {"method": "rtn", "bits": 8, "group_size": 16, **options}
    execute(parse_recipe({"model": str(folder), "steps": [step]}), output)
    return output


def with_other_prefix(architecture: str, folder: Path) -> None:
    prefix, bare = (PREFIXES | ENCODERS)[architecture], architecture.endswith("Model")

    def other(name: str) -> str:
        return f"{prefix}{name}" if bare else name.removeprefix(prefix)

    rename_tensors(folder, other)


@pytest.mark.parametrize("architecture", PREFIXES | ENCODERS)
def test_files_with_another_prefix(architecture: str, made: Callable[..., Path]):
    folder = made(architecture)
    names = set(load_file(folder / WEIGHTS))
    expected = in_transformers(architecture, folder)
    with_other_prefix(architecture, folder)
    assert set(load_file(folder / WEIGHTS)) != names

    assert open_checkpoint(folder).tensors.keys() == names
    assert torch.allclose(in_compress(folder), expected, atol=1e-5)
    output = quantized(folder)
    kept = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    inside = [name for name in ModelShape.of(Checkpoint.open(output)).linears() if name in kept]
    assert inside == []
    if "GPT2" not in architecture:  # transformers does not replace its Conv1D by packed ones
        close = in_transformers(architecture, output)
        assert torch.allclose(close, in_compress(output), atol=1e-4)
        assert (close - expected).norm() < 0.1 * expected.norm()


# What holds the model -> what it makes of a name.
WRAPPED: dict[str, Callable[[str], str]] = {
    "a model for images and text": lambda name: f"language_model.{name}",
    "one of transformers 5": lambda name: name.replace("model.", "model.language_model."),
    "torch's data-parallel wrapper": lambda name: f"module.{name}",
    "a compiled model": lambda name: f"_orig_mod.{name}",
    "a compiled base model": lambda name: f"_orig_mod.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("holder", WRAPPED)
def test_files_of_a_part_of_another_object(holder: str, tiny_decoder: Callable[..., Path]):
    folder = tiny_decoder()
    names = set(load_file(folder / WEIGHTS))
    rename_tensors(folder, WRAPPED[holder])
    assert names.isdisjoint(set(load_file(folder / WEIGHTS)) - {"lm_head.weight"})
    assert open_checkpoint(folder).tensors.keys() == names


def test_layers_of_another_tower_are_not_taken_for_those_of_the_model(tiny_decoder: Callable[..., Path]):
    folder = tiny_decoder()
    tensors, expected = load_file(folder / WEIGHTS), in_compress(folder)
    tower = {f"vision_tower.{n.replace('.1.', '.7.')}": t + 1 for n, t in tensors.items()}
    add_tensors(folder / WEIGHTS, **tower)
    assert open_checkpoint(folder).tensors.keys() == tensors.keys() | tower.keys()
    assert torch.equal(in_compress(folder), expected)


def test_norms_of_the_first_berts(tiny_encoder: Callable[..., Path]):
    folder = tiny_encoder("BertModel")
    expected, names = in_compress(folder), open_checkpoint(folder).tensors.keys()
    rename_tensors(
        folder,
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"),
    )
    assert open_checkpoint(folder).tensors.keys() == names
    assert torch.equal(in_compress(folder), expected)


def test_a_layer_beyond_the_config_is_left_out_with_a_warning(
    tiny_decoder: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    folder = tiny_decoder()
    names = open_checkpoint(folder).tensors.keys()
    assert not caplog.messages
    tensors = load_file(folder / WEIGHTS)
    extra = {n.replace("model.layers.0", "layers.2"): t for n, t in tensors.items() if ".layers.0." in n}
    add_tensors(folder / WEIGHTS, **extra)
    with caplog.at_level(logging.WARNING, "compress"):
        assert open_checkpoint(folder).tensors.keys() == names
    assert "hold layers beyond the 2 that config.json says" in caplog.text


# --- heads ---


def called_tied(architecture: str, made: Callable[..., Path], **settings: Any) -> Path:
    """A model whose config says tied, and whose files hold a head of its own."""
    folder = made(architecture, tie_word_embeddings=False, **settings)
    change_json(folder / "config.json", tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"embedding_bits": 8}),
        ("LlamaForCausalLM", {"lm_head_bits": 8}),
        ("GPTNeoXForCausalLM", {"lm_head_bits": 8, "embedding_bits": 8}),
        ("BertForMaskedLM", {"embedding_bits": 8}),
    ],
)
def test_a_head_of_its_own_stays_so(architecture: str, options: dict[str, int], made: Callable[..., Path]):
    folder = called_tied(architecture, made)
    expected = in_transformers(architecture, folder)
    assert torch.allclose(in_compress(folder), expected, atol=1e-5)
    output = quantized(folder, **options)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    for found in (in_compress(output), in_transformers(architecture, output)):
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_bias_that_is_stored_once_is_both(tiny_encoder: Callable[..., Path]):
    """Where the head of an encoder is its own, but the files hold its bias under one of two names."""
    folder = tiny_encoder("BertForMaskedLM", tie_word_embeddings=False)
    tensors = load_file(folder / WEIGHTS)
    tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    change_json(folder / "config.json", tie_word_embeddings=True)
    expected = in_transformers("BertForMaskedLM", folder)
    assert torch.allclose(in_compress(folder), expected, atol=1e-5)
    output = quantized(folder)
    for found in (in_compress(output), in_transformers("BertForMaskedLM", output)):
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_copy_of_the_embedding_is_no_head_of_its_own(
    tiny_decoder: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    folder = tiny_decoder(tie_word_embeddings=True)
    table = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    add_tensors(folder / WEIGHTS, **{"lm_head.weight": table.clone()})
    assert open_checkpoint(folder).config["tie_word_embeddings"] is True
    assert not caplog.messages
    add_tensors(folder / WEIGHTS, **{"lm_head.weight": table[:-1].clone()})
    with pytest.raises(BadInput, match=r"'lm_head.weight' has shape \[256, 64\]"):
        open_checkpoint(folder)


def test_a_model_said_to_be_untied_without_a_head_is_refused(tiny_decoder: Callable[..., Path]):
    folder = tiny_decoder(tie_word_embeddings=True)
    change_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(BadInput, match="set tie_word_embeddings to true"):
        compress.load(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    compress.load(folder)


def test_a_packed_model_is_complete_without_its_dense_weights(tiny_decoder: Callable[..., Path]):
    output = quantized(tiny_decoder(), lm_head_bits=8)
    tensors = load_file(output / WEIGHTS)
    open_checkpoint(output)
    del tensors["model.layers.1.mlp.down_proj.weight_packed"]
    save_file(tensors, output / WEIGHTS)
    with pytest.raises(BadInput, match=r"lacks the tensor 'model.layers.1.mlp.down_proj.weight'"):
        open_checkpoint(output)
