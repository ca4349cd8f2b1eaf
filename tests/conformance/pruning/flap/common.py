"""Tiny models of every family, and FLAP on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.method import StepContext, StepReport
from compress.pruning.flap import Flap
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

from ...common import random_windows

PUBLISHED = {"width_multiple": 1}
VOCAB, HIDDEN, LAYERS = 48, 16, 3
LENGTHS = (16, 16, 11, 7, 16, 5, 16, 13, 9, 16, 2, 16)
SIZE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GQA = {**SIZE, **SPECIAL, "intermediate_size": 20, "num_key_value_heads": 2}


class Family(NamedTuple):
    config: hf.PretrainedConfig
    cls: Any
    layers: str
    output: str
    down: str
    groups: int
    group_cost: int
    neuron_cost: int


CAUSAL = hf.AutoModelForCausalLM
FAMILIES = {
    # 4 query heads of 4 channels on 2 key-value heads: 8 rows of q, 4 of k, 4 of v, 8 columns of o.
    "llama": Family(
        hf.LlamaConfig(**GQA), CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16, 3 * 16
    ),
    # The same with biases for 16 rows.
    "qwen2": Family(
        hf.Qwen2Config(**GQA, tie_word_embeddings=True),
        *(CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16 + 16, 3 * 16),
    ),
    "phi3": Family(
        hf.Phi3Config(**GQA), CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16, 3 * 16
    ),
    "gpt2": Family(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=32, **SPECIAL),
        *(CAUSAL, "transformer.h", "attn.c_proj", "mlp.c_proj", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
    "neox": Family(
        hf.GPTNeoXConfig(**SIZE, **SPECIAL, intermediate_size=20, use_parallel_residual=True),
        *(CAUSAL, "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
    "bert": Family(
        hf.BertConfig(**SIZE, intermediate_size=20, max_position_embeddings=32, pad_token_id=0),
        *(hf.AutoModelForSequenceClassification, "bert.encoder.layer"),
        *("attention.output.dense", "output.dense", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
}


def random_model(family: Family, seed: int = 0) -> hf.PreTrainedModel:
    """A model every layer of which matters, in which channels have means and very different variances."""
    model = family.cls.from_config(family.config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                inputs = 1 if "embed" in name else parameter.shape["c_" not in name]  # Conv1D is [in, out]
                scale = torch.rand(parameter.shape[1], generator=generator) + 0.3
                parameter.copy_(noise * scale / math.sqrt(inputs))
            else:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
    return model.eval()


def windows_of(lengths: tuple[int, ...] = LENGTHS, width: int = 16, seed: int = 1) -> Windows:
    return random_windows(VOCAB, lengths, width, seed)


WINDOWS = windows_of()


class Applied(NamedTuple):
    run: StepContext
    report: StepReport

    @property
    def kept(self) -> list[tuple[int, int]]:
        details = self.report.details
        return list(zip(details["key_value_heads"], details["neurons"], strict=True))


def applied(
    folder: Path, work: Path, windows: Windows = WINDOWS, progress: Any = lambda *_: None, **options: Any
) -> Applied:
    checkpoint = Checkpoint.open(folder)
    run = StepContext(Draft(checkpoint, work), windows, 0, work, "cpu", progress)
    model = StreamedModel(checkpoint, progress=progress)
    return Applied(run, Flap().apply(model, Flap.Options(**PUBLISHED | options), run))
