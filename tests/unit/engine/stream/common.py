"""Tiny models of every architecture, and the windows that are streamed through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from compress.anatomy import anatomy_of, model_class
from compress.engine import stream as module
from compress.engine.windows import Windows

LAYERS = 3
SIZE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 48}
GQA = {**SIZE, **MLP, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}
GEMMA = {**WIDE, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48}
DISTIL = {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "pad_token_id": 0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}

# Every row of the anatomy table, with the variants that change what is around the layers or given to them.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True)),
    "llama, tied": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**WIDE, sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**GQA, **SLIDING)),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**WIDE, tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3_text": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)),
    "phi3": ("Phi3ForCausalLM", lambda: hf.Phi3Config(**GQA)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**OPT)),
    "opt, post-norm": (
        "OPTForCausalLM",
        lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**SIZE)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**SIZE, **MLP)),
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**SIZE, **MLP)),
    "bert, bare": ("BertModel", lambda: hf.BertConfig(**SIZE, **MLP)),
    "bert, classifier": ("BertForSequenceClassification", lambda: hf.BertConfig(**SIZE, **MLP)),
    "distilbert": ("DistilBertForMaskedLM", lambda: hf.DistilBertConfig(**DISTIL)),
    "roberta": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**SIZE, **MLP)),
    "mpnet": ("MPNetForMaskedLM", lambda: hf.MPNetConfig(**SIZE, **MLP)),
}


class Subject:
    """A tiny model in memory, and the folder it was saved in."""

    def __init__(self, case: str, folder: Path) -> None:
        name, build = CASES[case]
        config = build()
        config.architectures = [name]
        torch.manual_seed(0)
        self.model = model_class(config)._from_config(config, dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        if config.pad_token_id is not None:
            self.model.get_input_embeddings().weight.data[config.pad_token_id] = 0
        self.model.save_pretrained(folder)
        self.folder = folder
        self.anatomy = anatomy_of(config)
        self.layers = self.model.base_model.get_submodule(self.anatomy.layers)

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Hidden states before the first layer and after every layer, and the first output."""
        hidden: list[Tensor] = []
        handles = [
            self.layers[0].register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].clone()))
        ]
        handles += [
            layer.register_forward_hook(lambda _, __, output: hidden.append(module.hidden_of(output).clone()))
            for layer in self.layers
        ]
        options = {"use_cache": False} if self.anatomy.kind == "decoder" else {}
        output = self.model(tokens, attention_mask=mask, **options)
        for handle in handles:
            handle.remove()
        return hidden, output["logits"] if "logits" in output else output[0]


def make_windows(count: int = 5, length: int = 9, padded: bool = False) -> Windows:
    tokens = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        for row in range(count):
            mask[row, length - 2 * row + row // 2 : length] = row == 0
        tokens = torch.where(mask, tokens, 0)
    return Windows(tokens, mask, "made up")


def everything(stream: module.Stream) -> Tensor:
    return torch.cat([hidden for _, hidden, _ in stream.batches()])
