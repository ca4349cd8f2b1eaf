"""Tiny models of every task, and K-prune on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.method import StepContext, StepReport
from compress.pruning.kprune import KPrune
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

LENGTHS = (12, 12, 7, 12, 9, 12, 3, 12, 11, 12)
SEED = 5
PUBLISHED = {"min_heads": 0, "width_multiple": 1}
SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20}
SIZE |= {"vocab_size": 40, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1}
DISTIL = {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 20, "vocab_size": 40}
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**SIZE, num_key_value_heads=2)),
    "bert": ("BertForSequenceClassification", lambda: hf.BertConfig(**SIZE, num_labels=3)),
    "tokens": ("RobertaForTokenClassification", lambda: hf.RobertaConfig(**SIZE, num_labels=3)),
    "answers": ("DistilBertForQuestionAnswering", lambda: hf.DistilBertConfig(**DISTIL)),
    "regression": ("MPNetForSequenceClassification", lambda: hf.MPNetConfig(**SIZE, num_labels=1)),
    "many": (
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**SIZE, num_labels=3, problem_type="multi_label_classification"),
    ),
}


def windows_of(lengths: tuple[int, ...] = LENGTHS, padding: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 40, (len(lengths), 12), generator=generator)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    return Windows(tokens.where(mask, torch.tensor(padding)), mask, source="random")


class Result(SimpleNamespace):
    report: StepReport
    masks: dict[str, Tensor]
    draft: Draft

    def weights(self) -> dict[str, Tensor]:
        return {name: self.draft.read(name) for name in self.draft.tensors}


def run(
    folder: Path, work: Path, windows: Windows | None = None, progress: Any = None, **options: Any
) -> Result:
    checkpoint = Checkpoint.open(folder)
    work.mkdir(exist_ok=True)
    draft = Draft(checkpoint, work)
    method = KPrune()
    chosen = method.Options(**PUBLISHED | options)
    method.plan(ModelShape.of(checkpoint), chosen)
    given = StepContext(draft, windows or windows_of(), SEED, work, "cpu", progress or (lambda *_: None))
    report = method.apply(StreamedModel(checkpoint, "cpu", given.progress), chosen, given)
    draft.flush("step")
    progress_of = json.loads((work / "prune" / "progress.json").read_text())
    masks = load_file(work / "prune" / progress_of["state"])
    return Result(report=report, masks=masks, draft=draft)
