"""Statistics of a stream of tokens are those of all tokens at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration.statistics.moments import Moments, Products

C, CHOSEN = 6, torch.tensor([0, 2, 3])
OTHERS = torch.tensor([1, 4, 5])


def tokens(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1000 + torch.randn(count, C, generator=generator) * torch.logspace(-3, 2, C)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 20))
@settings(max_examples=40)
def test_batches_of_any_size(sizes: list[int], seed: int) -> None:
    x = tokens(sum(sizes), seed)
    if not len(x):
        return
    moments = Moments(C)
    products = {centred: Products(C, CHOSEN, centred) for centred in (True, False)}
    for batch in x.split(sizes):
        for seen in (moments, *products.values()):
            seen.add(batch)
    x = x.double()
    deviations = x - x.mean(0)

    assert moments.count == products[True].count == len(x)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.variance, deviations.square().mean(0), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(moments.squared_norm, x.square().sum(0))
    for centred, values in ((True, deviations), (False, x)):
        inputs = values[:, CHOSEN].T
        torch.testing.assert_close(products[centred].mean, x.mean(0))
        for found, expected in (
            (products[centred].among, inputs @ values[:, CHOSEN]),
            (products[centred].across, inputs @ values[:, OTHERS]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_tokens_are_left_as_they_are():
    x = tokens(5, 0).double()
    before = x.clone()
    for seen in (Moments(C), Products(C, CHOSEN, True)):
        seen.add(x)
    assert torch.equal(x, before)


def test_the_order_is_all_the_same():
    x = tokens(50, 1)
    one, other = Moments(C), Moments(C)
    for batch in x.split(10):
        one.add(batch)
    for batch in x.flip(0).split(10):
        other.add(batch)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-9, atol=0)
    assert one.mean.tolist() == pytest.approx(other.mean.tolist(), rel=1e-14)
