"""How close a compressed model stays to the dense one, token by token.

Both models read the same windows of text. At every position t whose next token is real (no padding), their
distributions over the vocabulary are compared: p of the dense model and q of the compressed one.

    negative log-likelihood   -ln q[token t+1]                 perplexity = exp of its mean
    KL(p || q)                sum_v p_v (ln p_v - ln q_v)      over the full vocabulary, in nats
    agreement                 argmax p = argmax q
    delta p                   q[token t+1] - p[token t+1]

The statistics are those of llama.cpp's perplexity tool and of "Accuracy Is Not All You Need"
(arXiv:2407.09141). The intervals are our own: means over tokens are ratio estimators clustered by window
(Cochran, Sampling Techniques, section 6.3), because neighbouring tokens are not independent; so is the share
of tokens that agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from compress.calibration.statistics.losses import LN_LARGEST
from compress.errors import BadInput, CompressError
from compress.evaluation.statistics import bounded_exp, mean_by_window, share_by_window
from compress.report.scorecard import Fidelity, Figure

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Logits = Tensor | Callable[[int, int], Tensor]


CHUNK_ELEMENTS = 2**21
"""Logits in one chunk of work: 8 MiB in float32, and about ten times as much with temporary tensors."""


class _Window(NamedTuple):
    """Sums over the scored tokens of one window, and the KL of each token."""

    nll_dense: float
    nll_model: float
    squared_delta_p: float
    agreements: int
    kl: np.ndarray  # float64 [tokens scored]


class FidelityAccumulator:
    """Computes the :class:`Fidelity` of a model from the logits of both models, window by window.

    Sums are float64 and exactly rounded (``math.fsum``), so the result does not depend on the order of
    windows.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._windows: list[_Window] = []

    @property
    def windows(self) -> int:
        """Number of windows with at least one scored token."""
        return len(self._windows)

    @property
    def tokens_scored(self) -> int:
        return sum(len(window.kl) for window in self._windows)

    def add(self, dense: Logits, model: Logits, tokens: Tensor, mask: Tensor) -> None:
        """Score one window.

        Args:
            dense, model: logits [S, V] of any floating dtype, or a function ``(start, stop)`` that computes
                the rows [stop - start, V], so that [S, V] need not be in memory.
            tokens: int64 [S].
            mask: bool [S], True for a real token. Position t counts if tokens t and t+1 are real.

        Raises:
            BadInput: the shapes do not fit together, or the two models have different vocabularies.
            CompressError: a logit is NaN or infinite.
        """
        import numpy as np
        import torch

        if tokens.ndim != 1 or tokens.shape != mask.shape:
            raise BadInput(
                f"A window needs tokens and mask of one shape [S], not {list(tokens.shape)} and "
                f"{list(mask.shape)}."
            )
        mask = mask.bool()
        scored = (mask[:-1] & mask[1:]).nonzero().squeeze(1).cpu()
        targets = tokens.cpu()[1:]
        if len(scored) == 0:
            return
        if not 0 <= int(targets[scored].min()) <= int(targets[scored].max()) < self.vocab_size:
            raise BadInput(
                f"The text has token ids outside the vocabulary of {self.vocab_size} entries; use the "
                "tokenizer of the model."
            )

        # Filled in place: small tensors that are kept from a chunk would fill the gaps that its large ones
        # leave in the heap, which would grow by a chunk every time.
        found = np.empty((4, len(scored)))
        done = 0
        rows = max(1, CHUNK_ELEMENTS // self.vocab_size)
        with torch.inference_mode():
            for start in range(0, len(targets), rows):
                stop = min(start + rows, len(targets))
                here = scored[(scored >= start) & (scored < stop)]
                if len(here):
                    p = self._rows(dense, start, stop, here, len(tokens), "dense")
                    q = self._rows(model, start, stop, here, len(tokens), "compressed")
                    compared = compare_tokens(p, q, targets[here].to(p.device))
                    values = torch.stack([each.double() for each in compared]).cpu()
                    found[:, done : done + len(here)] = values.numpy()
                    done += len(here)
        ln_p, ln_q, kl, agree = found
        if not np.isfinite(kl).all():
            raise CompressError(
                "The KL divergence overflows because the logits of the two models are too far apart; check "
                "the compressed model's weights."
            )
        delta_p = np.exp(ln_q) - np.exp(ln_p)
        self._windows.append(
            _Window(
                nll_dense=math.fsum(-ln_p),
                nll_model=math.fsum(-ln_q),
                squared_delta_p=math.fsum(delta_p**2),
                agreements=int(agree.sum()),
                kl=kl,
            )
        )

    def _rows(self, logits: Logits, start: int, stop: int, here: Tensor, length: int, whose: str) -> Tensor:
        """The rows ``here`` (of positions from start to stop) of the logits, in float32."""
        if callable(logits):
            rows = logits(start, stop)
            expected = [stop - start, self.vocab_size]
        else:
            rows = logits
            expected = [length, self.vocab_size]
        if list(rows.shape) != expected:
            raise BadInput(
                f"The {whose} model gives logits of shape {list(rows.shape)} instead of {expected}; both "
                "models must read the same windows with the same vocabulary."
            )
        rows = rows[(here - start if callable(logits) else here).to(rows.device)].float()
        if not rows.sum().isfinite():  # one pass; a NaN or infinity anywhere makes the sum one
            raise CompressError(
                f"The {whose} model gives logits that are NaN or infinite, so its weights are damaged or "
                "overflow in this dtype."
            )
        return rows

    def fidelity(self) -> Fidelity:
        """The fidelity of the compressed model.

        Raises:
            BadInput: no token was scored.
            CompressError: the perplexity is too large for a float64.
        """
        return _fidelity(self._scored_windows())

    def dense_fidelity(self) -> Fidelity:
        """The fidelity of the dense model: its perplexity, and no distance from itself.

        Raises:
            BadInput: no token was scored.
        """
        perplexity = _fidelity(self._scored_windows(), whose="dense").perplexity
        nothing = Figure(value=0, unit="nats/token")
        return Fidelity(
            perplexity=perplexity,
            perplexity_ratio=Figure(value=1),
            kl_mean=nothing,
            kl_standard_error=0.0,
            kl_median=nothing,
            kl_p99=nothing,
            kl_max=nothing,
            top1_agreement=Figure(value=1, unit="fraction"),
            rms_delta_p=Figure(value=0, unit="fraction"),
        )

    def _scored_windows(self) -> list[_Window]:
        if not self._windows:
            raise BadInput("The text has no token to score; it needs a window of at least two real tokens.")
        return self._windows


def compare_tokens(dense: Tensor, model: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the distributions p (dense) and q (model) of T tokens.

    Logits are shifted by their maximum. Sums over the vocabulary are torch's cascaded float32 sums (relative
    error about 1e-7, and many times faster than in float64). Everything after them is float64:

        KL = sum_v e^{z_v} (z_v - y_v) / Z_p + ln Z_q - ln Z_p    for shifted logits z (dense) and y (model)

    Args:
        dense, model: logits, float32 [T, V].
        targets: the next tokens, int64 [T].

    Returns:
        ln p[target], ln q[target], KL(p || q), each float64 [T], and whether the argmaxes agree, bool [T].
    """
    z, y = dense - dense.amax(-1, keepdim=True), model - model.amax(-1, keepdim=True)
    exp_z = z.exp()
    sum_p = exp_z.sum(-1).double()
    ln_sum_p, ln_sum_q = sum_p.log(), y.exp().sum(-1).double().log()
    ln_p = z.gather(-1, targets[:, None]).squeeze(-1).double() - ln_sum_p
    ln_q = y.gather(-1, targets[:, None]).squeeze(-1).double() - ln_sum_q
    agree = z.argmax(-1) == y.argmax(-1)
    kl = exp_z.mul_(z.sub_(y)).sum(-1).double() / sum_p + ln_sum_q - ln_sum_p
    return ln_p, ln_q, kl.clamp(min=0), agree  # rounding may take a KL of about 1e-8 below zero


def _fidelity(windows: list[_Window], *, whose: str = "compressed") -> Fidelity:
    import numpy as np

    counts = [len(window.kl) for window in windows]
    kl = np.sort(np.concatenate([window.kl for window in windows]))
    median, p99 = np.quantile(kl, [0.5, 0.99]).tolist()
    nll = mean_by_window([w.nll_dense if whose == "dense" else w.nll_model for w in windows], counts)
    if nll.mean > LN_LARGEST:
        raise CompressError(
            f"The perplexity of the {whose} model is too large to state ({nll.mean:.0f} nats per token), so "
            "the model is broken."
        )
    ln_ratio = mean_by_window([w.nll_model - w.nll_dense for w in windows], counts)
    mean_kl = mean_by_window([math.fsum(w.kl) for w in windows], counts)
    squared_delta_p = mean_by_window([w.squared_delta_p for w in windows], counts)

    return Fidelity(
        perplexity=nll.figure(bounded_exp),
        perplexity_ratio=ln_ratio.figure(bounded_exp),
        kl_mean=mean_kl.figure(lambda mean: max(0.0, mean), unit="nats/token"),
        kl_standard_error=mean_kl.standard_error,
        kl_median=Figure(value=median, unit="nats/token"),
        kl_p99=Figure(value=p99, unit="nats/token"),
        kl_max=Figure(value=float(kl[-1]), unit="nats/token"),
        top1_agreement=share_by_window([w.agreements for w in windows], counts),
        rms_delta_p=squared_delta_p.figure(lambda mean: math.sqrt(max(0.0, mean)), unit="fraction"),
    )
