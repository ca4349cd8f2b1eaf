"""Tiny models of every family, and ReplaceMe on them, whole or in part."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.method import StepContext, StepReport
from compress.pruning.parts.depth import Cut
from compress.pruning.replaceme import ReplaceMe
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.writer import write_weights

from ...common import random_windows

VOCAB, HIDDEN, LAYERS = 48, 16, 6
LENGTHS = (16, 16, 11, 7, 16, 5, 16, 13, 9, 16, 2, 16)


class Family(NamedTuple):
    config: transformers.PretrainedConfig
    layers: str
    down: str


SMALL = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig(
            **SMALL, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=True, **TOKENS
        ),
        "model.layers",
        "mlp.down_proj",
    ),
    "qwen3": Family(
        transformers.Qwen3Config(**SMALL, intermediate_size=40, num_key_value_heads=2, head_dim=8, **TOKENS),
        "model.layers",
        "mlp.down_proj",
    ),
    "gpt2": Family(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=32, **TOKENS
        ),
        "transformer.h",
        "mlp.c_proj",
    ),
    "neox": Family(
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=40, use_parallel_residual=True, **TOKENS),
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
    ),
    "opt": Family(
        transformers.OPTConfig(
            **SMALL, ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=32, **TOKENS
        ),
        "model.decoder.layers",
        "fc2",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model every layer of which matters: each block changes the residual stream about as much as it is."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                embeds = any(part in name for part in ("embed", "wte", "wpe"))
                inputs = 1 if embeds else parameter.shape["c_" not in name]  # Conv1D is [in, out]
                parameter.copy_(noise / math.sqrt(inputs))
            else:
                parameter.copy_(0.2 * noise + (1 if name.endswith("weight") else 0))
    return model.eval()


def folder_of(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def windows_of(lengths: tuple[int, ...] = LENGTHS, width: int = 16, seed: int = 1) -> Windows:
    return random_windows(VOCAB, lengths, width, seed)


class Applied(NamedTuple):
    model: StreamedModel
    run: StepContext
    report: StepReport | None = None


def opened(folder: Path, work: Path, windows: Windows, progress: Any = None) -> Applied:
    checkpoint = Checkpoint.open(folder)
    progress = progress or (lambda *_: None)
    run = StepContext(Draft(checkpoint, work), windows, 0, work, "cpu", progress)
    return Applied(StreamedModel(checkpoint, progress=progress), run)


def applied(
    folder: Path, work: Path, windows: Windows | None = None, progress: Any = None, **options: Any
) -> Applied:
    model, run, _ = opened(folder, work, windows or windows_of(), progress)
    options = {"transform": "cosine"} | options
    return Applied(model, run, ReplaceMe().apply(model, ReplaceMe.Options(**options), run))


def distances(folder: Path, work: Path, windows: Windows, **options: Any) -> torch.Tensor:
    model, run, _ = opened(folder, work, windows)
    return ReplaceMe().distances(model, windows, ReplaceMe.Options(**options), run)


def estimate(
    folder: Path, work: Path, windows: Windows, cuts: list[Cut], **options: Any
) -> dict[int, torch.Tensor]:
    model, run, _ = opened(folder, work, windows)
    options = {"transform": "cosine", "layers": sum(cut.length for cut in cuts)} | options
    kind = options["transform"]
    return ReplaceMe().estimate(model, windows, cuts, [kind], ReplaceMe.Options(**options), run)[kind]


def written(draft: Draft, folder: Path) -> transformers.PreTrainedModel:
    """What plain transformers makes of a draft."""
    folder.mkdir()
    write_weights(draft, folder)
    (folder / "config.json").write_text(json.dumps(draft.config))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    return model.eval()


def hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
