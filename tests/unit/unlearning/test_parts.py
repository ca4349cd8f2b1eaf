"""What the gradient baselines are made of: the records beside, and what the model computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress.calibration.text.records import TokenSequence, collate, read_records, sequences
from compress.engine.stream import StreamedModel
from compress.method import StepContext
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.unlearning.parts.beside import Beside
from compress.unlearning.parts.losses import negative_log_likelihood, scored_rows
from compress.unlearning.parts.reference import Reference
from compress.unlearning.parts.training import whole_model

from .common import FORGET, RETAIN, write_facts


def named(count: int) -> list[TokenSequence]:
    return [TokenSequence(str(number), (1, number), (-100, number)) for number in range(count)]


@pytest.mark.parametrize(("retain", "size", "steps"), [(10, 3, 8), (2, 4, 3), (8, 4, 2)])
def test_as_much_as_possible_is_retained(retain: int, size: int, steps: int) -> None:
    """All are seen before any is seen again, and step for step the same whichever steps were before."""
    beside, resumed = (Beside(named(retain), size, steps, 0, torch.Generator().manual_seed(1)) for _ in "ab")
    batch = {"forget": collate(named(2), 0)}
    assert sorted(beside.add_to(batch)) == ["forget", "retain"]
    seen: list[int] = []
    for step in range(steps):
        beside.follow().on_step_begin(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]
        tokens = beside.add_to(batch)["retain"]["input_ids"][:, 1].tolist()
        counts = [seen.count(number) for number in range(retain)]
        assert all(counts[number] == min(counts) for number in tokens)
        seen += tokens
        resumed.step = step
    assert resumed.add_to(batch)["retain"]["input_ids"][:, 1].tolist() == tokens
    assert len(set(seen)) == min(retain, len(seen))
    assert retain == 2 or seen != sorted(seen)


def test_without_a_retain_set_batches_have_no_such_role() -> None:
    batch = {"forget": collate(named(2), 0)}
    assert Beside([], 4, 3, 0, torch.Generator()).add_to(batch) is batch


ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 16},  # caps its logits
    "GPT2LMHeadModel": {},
    "OPTForCausalLM": {},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_the_model_as_it_was(
    shared_decoder: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    """Its logits, losses and hidden states, for batches in any order, with any padding."""
    dense = shared_decoder(architecture, **ARCHITECTURES[architecture])
    long = {"Kay": "a very long list of things, all of which are here"}
    file = write_facts(tmp_path / "facts.jsonl", FORGET | long | RETAIN)
    parts = sequences(read_records(str(file)), AutoTokenizer.from_pretrained(dense))
    model = StreamedModel(Checkpoint.open(dense))
    draft = Draft(model.checkpoint, tmp_path / "step")
    context = StepContext(draft, None, 0, tmp_path / "step", "cpu", lambda text, share: None)
    before = Reference(model, parts, context, "all")
    first = Reference(model, parts, context, "first", layers=1)
    whole = compress.load(dense, dtype="float32")
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(2)).tolist()
    with model.head() as head, torch.no_grad():
        losses = before.losses(head)
        for rows in (order[start : start + 3] for start in range(0, len(order), 3)):
            batch = collate([parts[row] for row in rows], 7)
            assert before.rows(batch) == rows
            labels = batch.pop("labels")
            found = whole(**batch, output_hidden_states=True)
            logits = scored_rows(found.logits, labels)
            assert torch.allclose(before.logits(head, rows), logits, atol=1e-4)
            assert torch.allclose(losses[rows], negative_log_likelihood(found.logits, labels), rtol=1e-4)
            states = scored_rows(found.hidden_states[1], labels)
            assert torch.allclose(first.states(rows), states, atol=1e-4)
    assert not torch.allclose(first.states([0]), before.states([0]), atol=1e-2)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("OPTForCausalLM", {"dropout": 0.1, "layerdrop": 0.5, "attention_dropout": 0.1}),
        ("GPT2LMHeadModel", {}),
        ("Phi3ForCausalLM", {"resid_pdrop": 0.1, "attention_dropout": 0.1}),
        ("GPTNeoXForCausalLM", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
        ("Gemma2ForCausalLM", {"attention_dropout": 0.1}),
        ("Qwen2ForCausalLM", {"attention_dropout": 0.1}),
    ],
)
def test_nothing_is_drawn_at_random_in_training(
    architecture: str, settings: dict[str, Any], shared_decoder: Callable[..., Path]
) -> None:
    folder = shared_decoder(architecture, **settings)
    whole = whole_model(StreamedModel(Checkpoint.open(folder), "cpu"), SimpleNamespace(device="cpu")).train()  # type: ignore[arg-type]
    tokens = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        assert torch.equal(whole(input_ids=tokens).logits, whole(input_ids=tokens).logits)
