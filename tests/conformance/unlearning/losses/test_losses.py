"""The losses of unlearning against their equations, written out in float64, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from compress.calibration.text.records import IGNORED
from compress.unlearning.parts.losses import (
    dpo,
    kl_to_reference,
    lengths,
    negative_log_likelihood,
    npo,
    scored_rows,
    simnpo,
    squared_distance,
    undial,
)

VOCABULARY, WIDTH = 11, 6


class Batch(NamedTuple):
    """Three sequences: a prompt of 2 and 3 scored tokens; 1 and 6; prose, all of which is scored, padded."""

    logits: Tensor
    other: Tensor
    labels: Tensor


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(VOCABULARY, (3, 7), generator=generator)
    labels[0, :2] = labels[0, 5:] = IGNORED
    labels[1, :1] = IGNORED
    labels[2, 0] = labels[2, 4:] = IGNORED

    def logits() -> Tensor:
        return 3 * torch.randn(3, 7, VOCABULARY, generator=generator)

    return Batch(logits(), logits(), labels)


def places(labels: Tensor, row: int) -> list[int]:
    """Where the scored tokens of a sequence are."""
    return [t for t in range(1, labels.shape[1]) if labels[row, t] >= 0]


def log_p(logits: Tensor) -> list[float]:
    """Log-probabilities of one prediction, in float64 and without torch's own softmax."""
    values = [float(value) for value in logits.double()]
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def nll(logits: Tensor, labels: Tensor, row: int) -> float:
    return -sum(log_p(logits[row, t - 1])[int(labels[row, t])] for t in places(labels, row))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def check(found: Tensor, expected: Callable[[int], float]) -> None:
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([expected(row) for row in range(len(found))], rel=1e-5)


def test_negative_log_likelihood_and_lengths(batch: Batch) -> None:
    check(
        negative_log_likelihood(batch.logits, batch.labels), lambda row: nll(batch.logits, batch.labels, row)
    )
    assert lengths(batch.labels).tolist() == [3, 6, 3]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo(batch: Batch, beta: float) -> None:
    now, before = (negative_log_likelihood(z, batch.labels) for z in (batch.logits, batch.other))

    def expected(row: int) -> float:
        gap = nll(batch.logits, batch.labels, row) - nll(batch.other, batch.labels, row)
        return -2 / beta * math.log(sigmoid(beta * gap))

    check(npo(now, before, beta), expected)


def test_npo_is_gradient_ascent_in_the_limit(batch: Batch) -> None:
    """At the start the gradient is that of −N, whatever β; far away it fades."""
    now = negative_log_likelihood(batch.logits, batch.labels).requires_grad_()
    (start,) = torch.autograd.grad(npo(now, now.detach(), 0.1).sum(), now)
    (later,) = torch.autograd.grad(npo(now, now.detach() - 100, 0.1).sum(), now)
    assert torch.allclose(start, torch.tensor(-1.0))
    assert (later.abs() < 1e-4).all()


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_simnpo(batch: Batch, margin: float) -> None:
    now = negative_log_likelihood(batch.logits, batch.labels)

    def expected(row: int) -> float:
        average = nll(batch.logits, batch.labels, row) / len(places(batch.labels, row))
        return -2 / 4.5 * math.log(sigmoid(4.5 * (average - margin)))

    check(simnpo(now, lengths(batch.labels), 4.5, margin), expected)


def test_dpo(batch: Batch) -> None:
    """The chosen answers are other tokens, with another number of scored ones."""
    beta, chosen = 0.3, batch.labels.flip(0)
    found = dpo(
        negative_log_likelihood(batch.logits, chosen),
        negative_log_likelihood(batch.other, chosen),
        negative_log_likelihood(batch.logits, batch.labels),
        negative_log_likelihood(batch.other, batch.labels),
        beta,
    )

    def expected(row: int) -> float:
        gained = nll(batch.other, chosen, row) - nll(batch.logits, chosen, row)
        lost = nll(batch.other, batch.labels, row) - nll(batch.logits, batch.labels, row)
        return -2 / beta * math.log(sigmoid(beta * (gained - lost)))

    check(found, expected)


def test_kl_to_reference(batch: Batch) -> None:
    def expected(row: int) -> float:
        total = 0.0
        for t in (where := places(batch.labels, row)):
            q, p = log_p(batch.other[row, t - 1]), log_p(batch.logits[row, t - 1])
            total += sum(math.exp(a) * (a - b) for a, b in zip(q, p, strict=True))
        return total / len(where)

    reference = scored_rows(batch.other, batch.labels)
    check(kl_to_reference(batch.logits, batch.labels, reference), expected)
    assert kl_to_reference(batch.other, batch.labels, reference).abs().max() < 1e-6


@pytest.mark.parametrize("beta", [0.0, 10.0])
def test_undial(batch: Batch, beta: float) -> None:
    def expected(row: int) -> float:
        total = 0.0
        for t in (where := places(batch.labels, row)):
            lowered = batch.other[row, t - 1].double().clone()
            lowered[batch.labels[row, t]] -= beta
            p = log_p(batch.logits[row, t - 1])
            total -= sum(math.exp(q) * p[v] for v, q in enumerate(log_p(lowered)))
        return total / len(where)

    reference = scored_rows(batch.other, batch.labels)
    kept = reference.clone()
    check(undial(batch.logits, batch.labels, reference, beta), expected)
    assert torch.equal(reference, kept)


def test_squared_distance(batch: Batch) -> None:
    hidden, before = batch.logits[..., :WIDTH], batch.other[..., :WIDTH]
    direction = torch.rand(WIDTH)

    def distance(row: int, target: Callable[[int], Tensor]) -> float:
        where = [t - 1 for t in places(batch.labels, row)]
        total = sum(float((hidden[row, t].double() - target(t).double()).square().sum()) for t in where)
        return total / len(where)

    check(squared_distance(hidden, batch.labels, direction), lambda row: distance(row, lambda t: direction))
    found = squared_distance(hidden, batch.labels, scored_rows(before, batch.labels))
    check(found, lambda row: distance(row, lambda t: before[row, t]))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nll": lambda z, y, other: negative_log_likelihood(z, y),
    "npo": lambda z, y, other: npo(negative_log_likelihood(z, y), negative_log_likelihood(other, y), 0.1),
    "simnpo": lambda z, y, other: simnpo(negative_log_likelihood(z, y), lengths(y), 4.5, 0.0),
    "undial": lambda z, y, other: undial(z, y, scored_rows(other, y), 10.0),
    "kl": lambda z, y, other: kl_to_reference(z, y, scored_rows(other, y)),
    "distance": lambda z, y, other: squared_distance(z, y, scored_rows(other, y)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_has_the_same_loss_and_gradient_in_every_batch(batch: Batch, name: str) -> None:
    """Neither padding nor the prompt nor the other sequences count, whatever their logits are."""
    loss = LOSSES[name]
    logits = batch.logits.clone().requires_grad_()
    together = loss(logits, batch.labels, batch.other)
    together.sum().backward()
    assert logits.grad is not None
    for row in range(3):
        last = max(places(batch.labels, row)) + 1
        cut = slice(row, row + 1), slice(0, last)
        single = batch.logits[cut].clone().requires_grad_()
        alone = loss(single, batch.labels[cut], batch.other[cut])
        alone.sum().backward()
        assert single.grad is not None
        assert alone[0].item() == pytest.approx(together[row].item(), rel=1e-6)
        assert torch.allclose(single.grad[0], logits.grad[row, :last], atol=1e-6)
        silent = [t for t in range(7) if t + 1 not in places(batch.labels, row)]
        assert (logits.grad[row, silent] == 0).all()


def test_half_precision_logits_are_scored_in_float32(batch: Batch) -> None:
    low, other = batch.logits.bfloat16(), batch.other.bfloat16()
    for loss in LOSSES.values():
        found = loss(low, batch.labels, other)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(low.float(), batch.labels, other.float()))
