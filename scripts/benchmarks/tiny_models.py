"""Tiny random models for `matrix.py`: one of every architecture, and what may be odd about a model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<eos>", "<mask>", "<cls>", "<sep>"]
SIZE = {"vocab_size": 261, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
MLP = {**SIZE, "intermediate_size": 128}
GQA = {**MLP, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
OPT = {**SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64}
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 261, "pad_token_id": 0}
DISTIL |= {"max_position_embeddings": 128}

# name -> (class, settings of its config): every row of the anatomy table, and decoders with other heads.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", {**GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3ForCausalLM", {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA),
    "phi3": ("Phi3ForCausalLM", GQA),
    "opt": ("OPTForCausalLM", OPT),
    "gpt2": ("GPT2LMHeadModel", {**SIZE, "n_inner": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", MLP),
    "bert": ("BertForSequenceClassification", MLP),
    "roberta": ("RobertaForTokenClassification", MLP),
    "distilbert": ("DistilBertForQuestionAnswering", DISTIL),
    "mpnet": ("MPNetForMaskedLM", MLP),
    "bert, no head": ("BertModel", MLP),
    "llama, one label": ("LlamaForSequenceClassification", {**GQA, "num_labels": 1}),
    "qwen3, tokens": ("Qwen3ForTokenClassification", {**GQA, "head_dim": 16}),
    "llama, answers": ("LlamaForQuestionAnswering", GQA),
    "mistral, no head": ("MistralModel", GQA),
}


def write_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model of that name with weights that matter, and a tokenizer of bytes, into ``folder``."""
    architecture, settings = ARCHITECTURES[name]
    cls = getattr(hf, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings, architectures=[architecture]))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows bytes and the tokens ``SPECIAL``."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ("pad_token", "eos_token", "mask_token", "cls_token", "sep_token")
    tokens: dict[str, Any] = dict(zip(names, SPECIAL, strict=True))
    hf.PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)


def write_text(file: Path) -> Path:
    """Write texts (.jsonl) to calibrate on, which are also examples of every task, with all of ASCII."""
    words = "It was the best of times, it was the worst of times, it was the age of wisdom."
    lines = (f"{words} {chr(33 + number % 90)} {number * number}." for number in range(400))
    rows = ({"text": line, "words": line.split(), "question": "How old?", "context": line} for line in lines)
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def _config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


def an_empty_quantization_config(folder: Path) -> None:
    """config.json has ``quantization_config: null``."""
    _config(folder, lambda values: values.update(quantization_config=None))


def no_architectures(folder: Path) -> None:
    """config.json names no class."""
    _config(folder, lambda values: values.pop("architectures", None))


def half_a_model(folder: Path) -> None:
    """The weights are float16, and config.json does not say so."""
    _weights(folder, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))


def a_layer_that_does_nothing(folder: Path) -> None:
    """The first layer adds zero, as in models that were made deeper."""
    ends = ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight")
    _weights(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith(ends)])


def two_shards(folder: Path) -> None:
    """The weights lie in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files[number >= len(names) // 2] for number, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name].clone() for name in names if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ODDITIES: dict[str, Callable[[Path], None]] = {
    oddity.__name__.replace("_", " "): oddity
    for oddity in (
        an_empty_quantization_config,
        no_architectures,
        half_a_model,
        a_layer_that_does_nothing,
        two_shards,
    )
}
"""What is odd -> a function that makes the folder of a llama so. Add functions here, and they are tried."""


def odd_model(folder: Path, dense: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the folder ``dense``, made odd by ``change``."""
    shutil.copytree(dense, folder)
    change(folder)
    return folder
