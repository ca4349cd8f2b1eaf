"""compress.evaluation.fidelity against a slow float64 restatement of its definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.evaluation.fidelity import FidelityAccumulator
from compress.evaluation.statistics import mean_by_window, share_by_window, wilson

VOCAB, CONTEXT = 97, 24


def make_windows(seed: int, count: int, noise: float) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for index in range(count):
        dense = 3 * torch.randn(CONTEXT, VOCAB, generator=generator)
        model = dense + noise * torch.randn(CONTEXT, VOCAB, generator=generator)
        tokens = torch.randint(VOCAB, (CONTEXT,), generator=generator)
        mask = torch.ones(CONTEXT, dtype=torch.bool)
        mask[CONTEXT - 3 * index :] = False
        windows.append((dense, model, tokens, mask))
    return windows


def restated(windows: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """The definitions, one token and one vocabulary entry at a time, in Python floats."""
    nll_dense, nll_model, kl, agree, delta_p, owner = [], [], [], [], [], []
    for index, (dense, model, tokens, mask) in enumerate(windows):
        for t in range(CONTEXT - 1):
            if not (mask[t] and mask[t + 1]):
                continue
            p = [math.exp(x) for x in dense[t].double().tolist()]
            q = [math.exp(x) for x in model[t].double().tolist()]
            p = [x / math.fsum(p) for x in p]
            q = [x / math.fsum(q) for x in q]
            true = int(tokens[t + 1])
            nll_dense.append(-math.log(p[true]))
            nll_model.append(-math.log(q[true]))
            kl.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
            agree.append(p.index(max(p)) == q.index(max(q)))
            delta_p.append(q[true] - p[true])
            owner.append(index)
    n, owner = len(kl), np.array(owner)

    def clustered(values: list[float]) -> float:
        values = np.array(values)
        residuals = np.array([(values[owner == w] - values.mean()).sum() for w in range(len(windows))])
        return math.sqrt(len(windows) / (len(windows) - 1) * (residuals**2).sum()) / n

    difference = np.array(nll_model) - np.array(nll_dense)
    student = 2.7764451051977987  # 97.5 % point of Student's t with 4 degrees of freedom (tables)
    z, share, worth = 1.959963984540054, np.mean(agree), n
    if clustered(agree):
        worth = min(n, share * (1 - share) / clustered(agree) ** 2 * (z / student) ** 2)
    centre = (share + z * z / (2 * worth)) / (1 + z * z / worth)
    reach = z / (1 + z * z / worth) * math.sqrt(share * (1 - share) / worth + z * z / (4 * worth * worth))
    return {
        "tokens": n,
        "perplexity": math.exp(np.mean(nll_model)),
        "perplexity_low": math.exp(np.mean(nll_model) - student * clustered(nll_model)),
        "dense_perplexity": math.exp(np.mean(nll_dense)),
        "ratio": math.exp(difference.mean()),
        "ratio_low": math.exp(difference.mean() - student * clustered(difference)),
        "ratio_high": math.exp(difference.mean() + student * clustered(difference)),
        "kl": np.mean(kl),
        "kl_se": clustered(kl),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_max": max(kl),
        "agreement": share,
        "agreement_low": centre - reach,
        "agreement_high": centre + reach,
        "delta_p": math.sqrt(np.mean(np.square(delta_p))),
    }


@pytest.mark.parametrize("noise", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("chunk", [VOCAB, 5 * VOCAB, 2**22])
def test_every_statistic_is_the_restated_one(noise: float, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("compress.evaluation.fidelity.CHUNK_ELEMENTS", chunk)
    windows = make_windows(seed=1, count=5, noise=noise)
    accumulator = FidelityAccumulator(VOCAB)
    for window in windows:
        accumulator.add(*window)
    found, expected = accumulator.fidelity(), restated(windows)

    close = lambda value: pytest.approx(value, rel=2e-5, abs=2e-7)  # noqa: E731
    assert accumulator.tokens_scored == expected["tokens"]
    assert accumulator.windows == 5
    assert found.perplexity.value == close(expected["perplexity"])
    assert found.perplexity.low == close(expected["perplexity_low"])
    assert accumulator.dense_fidelity().perplexity.value == close(expected["dense_perplexity"])
    assert found.perplexity_ratio.value == close(expected["ratio"])
    assert found.perplexity_ratio.low == close(expected["ratio_low"])
    assert found.perplexity_ratio.high == close(expected["ratio_high"])
    assert found.kl_mean.value == close(expected["kl"])
    assert found.kl_standard_error == close(expected["kl_se"])
    assert found.kl_median.value == close(expected["kl_median"])
    assert found.kl_p99.value == close(expected["kl_p99"])
    assert found.kl_max.value == close(expected["kl_max"])
    assert found.top1_agreement.value == expected["agreement"]
    assert found.top1_agreement.low == close(expected["agreement_low"])
    assert found.top1_agreement.high == close(expected["agreement_high"])
    assert found.rms_delta_p.value == close(expected["delta_p"])


def test_clustered_interval_covers_at_its_nominal_rate():
    """Windows with a shared offset: 95 % intervals hold the truth that often, naive ones do not."""
    from scipy.stats import t

    generator, truth, covered, naive = np.random.default_rng(0), 2.0, 0, 0
    for _ in range(600):
        counts = generator.integers(20, 40, size=12)
        draws = [truth + generator.normal(0, 1) + generator.normal(0, 1, size=c) for c in counts]
        found = mean_by_window([math.fsum(d) for d in draws], counts.tolist())
        covered += abs(found.mean - truth) <= t.ppf(0.975, found.windows - 1) * found.standard_error
        flat = np.concatenate(draws)
        naive += abs(flat.mean() - truth) <= 1.96 * flat.std() / math.sqrt(len(flat))
    assert 0.91 <= covered / 600 <= 0.98
    assert naive / 600 < 0.7


def test_the_interval_of_a_share_is_clustered_by_window():
    """Windows that agree more or less: 95 % intervals hold the truth that often, those of tokens do not."""
    generator, truth, covered, naive = np.random.default_rng(1), 0.8, 0, 0
    for _ in range(600):
        counts = generator.integers(150, 200, size=12)
        shares = generator.beta(16, 4, size=12)  # their mean is the truth
        agreed = generator.binomial(counts, shares)
        clustered = share_by_window(agreed.tolist(), counts.tolist())
        alone = wilson(int(agreed.sum()), int(counts.sum()))
        assert clustered.value == alone.value
        assert clustered.low <= alone.low < clustered.value < alone.high <= clustered.high
        covered += clustered.low <= truth <= clustered.high
        naive += alone.low <= truth <= alone.high
    assert 0.91 <= covered / 600 <= 0.98
    assert naive / 600 < 0.7


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (7, 7), (3, 40), (4087, 4088)])
def test_wilsons_interval_is_scipys(successes: int, total: int):
    from scipy.stats import binomtest

    found, its = wilson(successes, total), binomtest(successes, total).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((its.low, its.high), abs=1e-12)


def test_a_share_without_spread_is_that_of_its_tokens_and_of_one_window_has_no_interval():
    assert share_by_window([50, 60], [50, 60]) == wilson(110, 110)
    assert share_by_window([25, 30], [50, 60]) == wilson(55, 110)
    alone = share_by_window([25], [50])
    assert (alone.value, alone.low, alone.high) == (0.5, None, None)
