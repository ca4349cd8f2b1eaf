"""What the gradient baselines are made of: pairs of records, and what the model computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress.calibration.text.records import TokenSequence, collate, read_records, sequences
from compress.engine.stream import StreamedModel
from compress.method import StepContext
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.unlearning.parts.losses import negative_log_likelihood, scored_rows
from compress.unlearning.parts.pairs import Pairs
from compress.unlearning.parts.reference import Reference

from .common import FORGET, RETAIN, write_facts


def named(prefix: str, count: int) -> list[TokenSequence]:
    return [TokenSequence(f"{prefix}{number}", (1, number), (-100, number)) for number in range(count)]


@pytest.mark.parametrize(("forget", "retain", "epochs"), [(3, 10, 4), (5, 2, 3), (4, 4, 2)])
def test_every_epoch_forgets_all_and_retains_others(forget: int, retain: int, epochs: int) -> None:
    pairs = Pairs({"forget": named("f", forget)}, named("r", retain), torch.Generator().manual_seed(1))
    follow = pairs.follow_epochs()
    seen: list[str] = []
    for epoch in range(epochs):
        follow.on_epoch_begin(None, SimpleNamespace(epoch=float(epoch)), None)  # type: ignore[arg-type]
        examples = [pairs[index] for index in range(len(pairs))]
        assert [example["forget"].id for example in examples] == [f"f{number}" for number in range(forget)]
        seen += [example["retain"].id for example in examples]
    counts = [seen.count(f"r{number}") for number in range(retain)]
    assert max(counts) - min(counts) <= 1  # all are seen before any is seen again
    assert seen != sorted(seen)


def test_pairs_without_a_retain_set_have_no_such_role() -> None:
    pairs = Pairs({"forget": named("f", 2), "refusal": named("no", 2)}, [], torch.Generator())
    assert [sorted(example) for example in pairs] == [["forget", "refusal"]] * 2
    assert pairs[1]["refusal"].id == "no1"


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
