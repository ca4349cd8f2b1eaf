"""The detector of Key Space Detection: the space of keys, its calibration, and how well it separates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from compress.engine.abstaining import distance
from compress.engine.adjusting import SMALLEST
from compress.errors import BadInput

if TYPE_CHECKING:
    from compress.storage.checkpoint import Checkpoint


FLAT = 1e-3
"""A coordinate whose sigma is below this share of their median says nothing, and is not looked at."""

CURVE = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Rates of false positives at which the detector's curve is reported."""

MARGIN = 1e-3
"""How much farther than to the farthest key inside the radius reaches, unless the next key is nearer."""


class Detector:
    """mu, sigma (float32 [I], 0 where a coordinate is left out) and k of the keys of prompts to forget."""

    def __init__(self, mean: Tensor, deviation: Tensor, k: float = 0.0) -> None:
        self.mean, self.deviation, self.k = mean, deviation, k

    @classmethod
    def of(cls, keys: Tensor) -> Detector:
        """Fit keys [N, I].

        Raises:
            BadInput: the keys are all the same.
        """
        mean, deviation = keys.double().mean(0), keys.double().std(0, correction=0)
        least = max(SMALLEST, FLAT * float(deviation.median()))
        deviation = deviation.where(deviation > least, 0.0)
        if not bool(deviation.any()):
            raise BadInput("The prompts to forget all have the same key, so they have no space; give others.")
        detector = cls(mean.float(), deviation.float())
        detector.k = float(detector.distances(keys).max())
        return detector

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, width: int) -> Detector | None:
        """Those of an earlier model; None if its keys are of another layer or width."""
        names = [f"{name}.{leaf}" for leaf in ("mean", "deviation")]
        if any(n not in checkpoint or checkpoint.tensors[n].shape != (width,) for n in names):
            return None
        mean, deviation = (checkpoint.read(n) for n in names)
        return cls(mean, deviation)

    def distances(self, keys: Tensor) -> Tensor:
        """max_j |x_j - mu_j| / sigma_j of keys [N, I], as the model computes it: float32 [N]."""
        return distance(keys.float(), self.mean, self.deviation)


def calibrate(forget: Tensor, retain: Tensor, coverage: float, false_positives: float) -> float:
    """The radius h k: the largest distance at which a key counts as inside.

    A further key to retain is nearer than the n-th nearest of M others with a probability of n / (M + 1), as
    split conformal prediction has it. So the radius ends before the n-th nearest, with the largest n for
    which that is at most ``false_positives``. With too few prompts for any, it ends before the nearest.

    Args:
        forget, retain: distances of held-out keys, float32 [N] and [M].
        coverage: the share of ``forget`` that is to be inside.
        false_positives: the largest expected share of prompts to retain inside, which comes first.

    Returns:
        A radius above 0, which is a little more than the distance of the farthest key inside, so that
        rounding does not change what is inside.
    """
    wanted = float(forget.double().quantile(coverage, interpolation="higher"))
    first_outside = float(retain.double().sort().values[max(_nearest(false_positives, len(retain)) - 1, 0)])
    found = [0.0, *map(float, torch.cat([forget, retain]))]
    inner = max(value for value in found if value <= wanted and value < first_outside)
    outer = min((value for value in found if value > inner), default=math.inf)
    return min((inner + outer) / 2, inner * (1 + MARGIN)) or outer / 2


def promised(false_positives: float, count: int) -> float:
    """The expected share of prompts to retain inside after `calibrate` with ``count`` of them."""
    return max(_nearest(false_positives, count), 1) / (count + 1)


def _nearest(false_positives: float, count: int) -> int:
    """The largest n with n / (count + 1) at most ``false_positives``."""
    return int(false_positives * (count + 1) * (1 + 1e-12))


def rates(
    detector: Detector, radius: float, held_out: Tensor, calibrated: Tensor, checked: Tensor
) -> dict[str, Any]:
    """What share of each part of the keys is refused, and of those to forget is not."""
    parts = {"forget_held_out": held_out, "retain_calibrated": calibrated, "retain_checked": checked}
    refused = {
        part: round(float((detector.distances(keys) <= radius).double().mean()), 6)
        for part, keys in parts.items()
    }
    return {"refused": refused, "false_negatives": round(1 - refused["forget_held_out"], 6)}


def roc(forget: Tensor, retain: Tensor) -> dict[str, Any]:
    """The detector's curve: its area, and the share of ``forget`` that is found at rates of false positives.

    Args:
        forget, retain: distances [N] and [M].
    """
    area = mannwhitneyu(retain.numpy(), forget.numpy()).statistic / (len(forget) * len(retain))
    inward = retain.sort().values
    points = []
    for rate in CURVE:
        limit = inward[min(int(rate * len(retain)), len(retain) - 1)]
        points.append(
            {
                "false_positives": round(float((retain < limit).float().mean()), 6),
                "true_positives": round(float((forget < limit).float().mean()), 6),
            }
        )
    return {
        "auc": float(area),
        "points": [point for n, point in enumerate(points) if point not in points[:n]],
    }
