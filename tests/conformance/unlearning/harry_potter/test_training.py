"""Who's Harry Potter from end to end: one step of each training, against the same in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from tests.conformance.unlearning.harry_potter import restated

ROWS = (
    {"text": "Harry went to Hogwarts. Harry ran."},
    {"question": "Who is Harry?", "answer": "A boy at Hogwarts."},
)
TEXTS = (
    (["Harry went to Hogwarts. Harry ran."], [True]),
    (["Question: Who is Harry?\nAnswer:", " A boy at Hogwarts.<eos>"], [False, True]),
)
ANCHORS = {"Harry": "Jon", "Hogwarts": "the School of Milton"}
ALPHA, SUPPRESSION, REINFORCING_RATE, RATE = 4.0, 2.0, 1e-2, 1e-3


def adam_step(model: torch.nn.Module, texts: Sequence[tuple[list[int], dict[int, int]]], rate: float) -> None:
    """The first step of AdamW on the mean over texts of the mean loss of their labels (index -> label)."""
    loss = torch.zeros((), dtype=torch.float64)
    for tokens, labels in texts:
        log_p = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        loss = loss - sum(log_p[t - 1, label] for t, label in labels.items()) / len(labels) / len(texts)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= rate * parameter.grad / (parameter.grad.abs() + 1e-8)
            parameter.grad = None


def test_one_step_of_each_training(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    dense = shared_decoder("LlamaForCausalLM")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "anchors.json").write_text(json.dumps(ANCHORS))
    step = {
        "method": "harry-potter",
        "forget": str(tmp_path / "forget.jsonl"),
        "anchors": str(tmp_path / "anchors.json"),
        "alpha": ALPHA,
        "suppression": SUPPRESSION,
        "reinforce": "full",
        "reinforce_epochs": 1,
        "reinforce_learning_rate": REINFORCING_RATE,
        "epochs": 1,
        "learning_rate": RATE,
        "max_gradient_norm": 1e9,
    }
    recipe = {"model": str(dense), "steps": [step]}
    details = execute(parse_recipe(recipe), tmp_path / "out").steps[0].details

    base = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float64)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(dense)
    reinforced = copy.deepcopy(base)
    own = []
    for pieces, learned in TEXTS:
        parts = [tokenizer(piece)["input_ids"] for piece in pieces]
        tokens = [token for part in parts for token in part]
        flags = [flag for part, flag in zip(parts, learned, strict=True) for _ in part]
        own.append((tokens, {t: tokens[t] for t in range(1, len(tokens)) if flags[t]}))
    adam_step(reinforced, own, REINFORCING_RATE)
    generic = []
    for (pieces, learned), (tokens, _) in zip(TEXTS, own, strict=True):
        models = (restated.exact(base), restated.exact(reinforced))
        options = {"alpha": ALPHA, "suppression": SUPPRESSION, "reference": "translated"}
        found = restated.labels(pieces, learned, ANCHORS, tokenizer, *models, **options)
        assert min(margin for _, margin in found.values()) > 1e-3
        generic.append((tokens, {t: label for t, (label, _) in found.items()}))
    adam_step(base, generic, RATE)

    assert details["labels"] == sum(len(labels) for _, labels in generic)
    assert details["anchors"]["found"] == 5
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = torch.cat([(base.state_dict()[name] - before[name]).flatten() for name in after]) / RATE
    found = torch.cat([(after[name].double() - before[name]).flatten() for name in after]) / RATE
    assert moved.abs().median() > 0.9
    close = (found - moved).abs() < 0.05  # where a gradient is next to 0, float32 may give it another sign
    assert close.double().mean() > 0.99
