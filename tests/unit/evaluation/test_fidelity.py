from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput, CompressError
from compress.evaluation.fidelity import FidelityAccumulator

VOCAB, CONTEXT = 50, 16


def window(seed: int, noise: float = 0.3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    dense = (4 * torch.randn(CONTEXT, VOCAB, generator=generator)).to(dtype)
    model = (dense + noise * torch.randn(CONTEXT, VOCAB, generator=generator)).to(dtype)
    tokens = torch.randint(VOCAB, (CONTEXT,), generator=generator)
    mask = torch.rand(CONTEXT, generator=generator) < 0.9
    return dense, model, tokens, mask


def score(windows) -> FidelityAccumulator:
    accumulator = FidelityAccumulator(VOCAB)
    for one in windows:
        accumulator.add(*one)
    return accumulator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense_against_dense_is_exactly_nothing(dtype: torch.dtype):
    accumulator = score(
        (dense, dense.clone(), tokens, mask) for dense, _, tokens, mask in map(window, range(4))
    )
    found = accumulator.fidelity()
    for figure in (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max, found.rms_delta_p):
        assert figure.value == 0
    assert (found.kl_mean.low, found.kl_mean.high, found.kl_standard_error) == (0, 0, 0)
    assert found.top1_agreement.value == found.top1_agreement.high == 1
    assert 0.9 < found.top1_agreement.low < 1
    ratio = found.perplexity_ratio
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert found.perplexity == accumulator.dense_fidelity().perplexity


@settings(max_examples=25)
@given(st.permutations(range(6)))
def test_the_order_of_windows_does_not_matter(order: list[int]):
    assert score(map(window, order)).fidelity() == score(map(window, range(6))).fidelity()


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), noise=st.floats(0, 5))
def test_properties_of_divergence(seed: int, shift: float, noise: float):
    dense, model, tokens, _ = window(seed, noise)
    mask = torch.ones(CONTEXT, dtype=torch.bool)
    found = score([(dense, model, tokens, mask)]).fidelity()
    shifted = score([(dense, model + shift, tokens, mask)]).fidelity()  # softmax forgets a constant
    assert 0 <= found.kl_median.value <= found.kl_p99.value <= found.kl_max.value
    assert shifted.kl_mean.value == pytest.approx(found.kl_mean.value, rel=1e-4, abs=1e-5)
    dense_perplexity = score([(dense, model, tokens, mask)]).dense_fidelity().perplexity.value
    assert found.perplexity_ratio.value == pytest.approx(found.perplexity.value / dense_perplexity)
    assert found.perplexity.low is None  # one window says nothing about how windows vary


def test_only_pairs_of_real_tokens_count():
    dense, model, tokens, _ = window(3)
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1] + [0] * 9, dtype=torch.bool)
    accumulator = score([(dense, model, tokens, mask)])
    assert accumulator.tokens_scored == 3
    poisoned = dense.clone()
    poisoned[[0, 2, 3, 6, 9]] = float("nan")  # predictions from or of padding
    assert score([(poisoned, model, tokens, mask)]).fidelity() == accumulator.fidelity()


def test_logits_may_come_in_rows_on_demand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("compress.evaluation.fidelity.CHUNK_ELEMENTS", 3 * VOCAB)
    dense, model, tokens, mask = window(5)
    asked = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return model[start:stop]

    assert score([(dense, rows, tokens, mask)]).fidelity() == score([(dense, model, tokens, mask)]).fidelity()
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)]


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whose", ["dense", "compressed"])
def test_logits_that_are_not_finite_are_refused(damage: float, whose: str):
    dense, model, tokens, _ = window(1)
    mask = torch.ones(CONTEXT, dtype=torch.bool)
    (dense if whose == "dense" else model)[4, 7] = damage
    with pytest.raises(CompressError, match=f"^The {whose} model gives logits that are NaN or infinite"):
        score([(dense, model, tokens, mask)])


def test_wrong_input_is_told_in_a_sentence():
    dense, model, tokens, mask = window(2)
    with pytest.raises(BadInput, match="same vocabulary"):
        score([(dense, model[:, :-1], tokens, mask)])
    with pytest.raises(BadInput, match="same vocabulary"):
        score([(dense, lambda start, stop: model[start:stop, :-1], tokens, mask)])
    with pytest.raises(BadInput, match="outside the vocabulary of 50"):
        score([(dense, model, tokens + VOCAB, torch.ones_like(mask))])
    with pytest.raises(BadInput, match="one shape"):
        score([(dense, model, tokens, mask[:-1])])
    with pytest.raises(BadInput, match="no token to score"):
        score([(dense, model, tokens, torch.zeros_like(mask))]).fidelity()


def test_a_broken_model_is_named():
    dense, _, tokens, _ = window(2)
    mask = torch.ones(CONTEXT, dtype=torch.bool)
    model = torch.zeros(CONTEXT, VOCAB)
    model[torch.arange(CONTEXT - 1), tokens[1:]] = -5000.0
    with pytest.raises(CompressError, match="5004 nats per token"):
        score([(dense, model, tokens, mask)]).fidelity()


def test_memory_stays_bounded_with_a_large_vocabulary():
    """Two [512, 131072] float32 tables would be 512 MiB; the rows come, are compared, and go."""
    code = """
import torch
from compress.evaluation.fidelity import CHUNK_ELEMENTS, FidelityAccumulator
from compress.system.memory import peak_memory
vocabulary, context = 131072, 512
hidden, head = torch.randn(context, 8), torch.randn(8, vocabulary)
accumulator = FidelityAccumulator(vocabulary)
rows = lambda start, stop: hidden[start:stop] @ head
few = torch.arange(context) < 3
accumulator.add(rows, rows, torch.zeros(context, dtype=torch.int64), few)
before = peak_memory()
accumulator.add(rows, rows, torch.zeros(context, dtype=torch.int64), torch.ones(context, dtype=torch.bool))
print(peak_memory() - before)
"""
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(child.stdout) < 150 * 2**20
