"""The detector of Key Space Detection against its definition, restated in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.engine.abstaining import Abstention, KeySpace
from compress.engine.passes import Pass
from compress.errors import BadInput
from compress.unlearning.parts.detector import Detector, calibrate, promised, roc

WIDTH = 40


def keys(count: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, WIDTH) + shift


def test_space_of_the_keys() -> None:
    fitted, others = keys(60), keys(500, scale=1.5)
    fitted[:, 3] = 2.0  # says nothing
    fitted[:, 4] = 2.0 + 1e-5 * torch.randn(60)
    detector = Detector.of(fitted)
    x = fitted.double().numpy()
    mean, deviation = x.mean(0), x.std(0)
    kept = np.ones(WIDTH, dtype=bool)
    kept[[3, 4]] = False
    assert np.array_equal(detector.deviation.numpy() > 0, kept)
    assert np.allclose(detector.deviation.numpy()[kept], deviation[kept], rtol=1e-6)
    scores = abs(x - mean)[:, kept] / deviation[kept]
    assert detector.k == pytest.approx(scores.max(), rel=1e-5)
    space = KeySpace(WIDTH, 0.8 * detector.k, "cpu")
    space.load_state_dict({"mean": detector.mean, "deviation": detector.deviation})
    inside = (abs(others.double().numpy() - mean) <= 0.8 * detector.k * deviation)[:, kept].all(1)
    assert np.array_equal(space(others).numpy(), inside)
    assert 0 < inside.mean() < 1
    with pytest.raises(BadInput, match="all have the same key"):
        Detector.of(torch.ones(5, WIDTH))


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_width_lets_in_few_retained_prompts(shift: float, limit: float) -> None:
    detector = Detector.of(keys(100))
    forget, retain = (detector.distances(part) for part in (keys(80), keys(400, shift)))
    radius = calibrate(forget, retain, 0.95, limit)
    assert radius > 0
    assert float((retain <= radius).double().mean()) <= limit
    covered = float((forget <= radius).double().mean())
    if covered < 0.95:  # then the next prompt to retain would be one too many
        following = min(value for value in retain.tolist() if value > radius)
        assert (int((retain <= following).sum()) + 1) / 401 > limit
    # On prompts to retain that nothing was fitted or calibrated on:
    assert (
        float((detector.distances(keys(20_000, shift)) <= radius).double().mean())
        <= limit + 0.02 + 3 * (limit / 400) ** 0.5
    )


@pytest.mark.parametrize(("count", "limit"), [(99, 0.01), (150, 0.01), (40, 0.1), (30, 0.01)])
def test_promised_false_positives_hold_for_other_prompts(count: int, limit: float) -> None:
    """On average over calibrations; distances of a uniform distribution are their own share."""
    radii = [calibrate(torch.ones(3), torch.rand(count), 0.95, limit) for _ in range(4000)]
    expected = promised(limit, count)
    assert expected <= max(limit, 1 / (count + 1))
    assert expected + 1 / (count + 1) > limit
    assert np.mean(radii) <= expected * (1 + 3 / 4000**0.5)
    # Between the last key inside and the first one outside lies one step of 1 / (count + 1).
    assert np.mean(radii) >= expected - 1.1 / (count + 1)


def test_curve() -> None:
    forget, retain = torch.rand(30), torch.rand(50) + 0.3
    found = roc(forget, retain)
    pairs = forget[:, None] < retain[None]
    assert found["auc"] == pytest.approx(float(pairs.double().mean()), abs=1e-6)
    points = [(point["false_positives"], point["true_positives"]) for point in found["points"]]
    assert points == sorted(points)
    assert all(
        any(
            float((retain < limit).double().mean()) == pytest.approx(wrong, abs=1e-5)
            and float((forget < limit).double().mean()) == pytest.approx(right, abs=1e-5)
            for limit in retain
        )
        for wrong, right in points
    )


# --- which texts are refused, and how far their refusals are ---

REFUSAL = (7, 8, 9)


def states(
    inside: list[list[int]],
    tokens: list[list[int]] | None = None,
    real: list[list[int]] | None = None,
    asked: int = 1,
    before: list[int] | None = None,
    check: str = "prompt-only",
) -> list[list[int]]:
    """The states of texts of which ``inside`` says which tokens have a key in the space."""
    space = KeySpace(1, 1.0, "cpu")
    space.load_state_dict({"mean": torch.zeros(1), "deviation": torch.ones(1)})
    abstention = Abstention(space, check, REFUSAL, 2, Pass())  # type: ignore[arg-type]
    there = torch.tensor(inside)
    return abstention.states(
        5.0 - 5.0 * there[..., None],
        torch.zeros_like(there) if tokens is None else torch.tensor(tokens),
        torch.ones_like(there).bool() if real is None else torch.tensor(real).bool(),
        asked,
        None if before is None else torch.tensor(before),
    ).tolist()


def test_the_last_token_of_each_prompt_decides() -> None:
    assert states([[0, 0, 1], [1, 1, 0]]) == [[0, 0, 1], [0, 0, 0]]
    padding = [[0, 1, 1], [1, 1, 0]]
    assert states([[1, 0, 1], [0, 1, 1]], real=padding, asked=0) == [[0, 0, 1], [0, 1, 1]]
    assert states([[1, 0, 0], [0, 0, 1]], real=padding, asked=0) == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("check", ["prompt-only", "every-step"])
def test_guesses_at_the_answer_follow_the_prompt(check: str) -> None:
    assert states([[0, 1, 0, 0]], asked=3, check=check) == [[0, 1, 2, 3]]
    assert states([[1, 0, 0, 0]], asked=3, check=check) == [[0, 0, 0, 0]]
    later = [[0, 0, 1, 2]] if check == "every-step" else [[0, 0, 0, 0]]
    assert states([[0, 0, 1, 0]], asked=3, check=check) == later
    assert states([[0, 0, 1, 0]], asked=4, before=[0], check=check) == later


@pytest.mark.parametrize("check", ["prompt-only", "every-step"])
def test_steps_after_the_prompt(check: str) -> None:
    found = states([[1], [0], [1]], before=[0, 0, 2], check=check)
    assert found == ([[1], [0], [3]] if check == "every-step" else [[0], [0], [3]])


def test_a_refusal_that_is_over_ends_with_the_next_prompt() -> None:
    assert states([[0, 0], [0, 1], [0, 0]], before=[4, 3, 1]) == [[0, 0], [0, 1], [2, 3]]


def test_without_a_cache_the_text_tells_how_far_it_is() -> None:
    tokens = [[1, 2, 7, 8], [1, 2, 7, 8], [2, 7, 8, 9], [1, 2, 8, 7], [0, 1, 2, 7]]
    inside = [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    real = [[1, 1, 1, 1]] * 4 + [[0, 1, 1, 1]]
    found = states(inside, tokens, real)
    assert [row[-1] for row in found] == [3, 0, 4, 0, 2]
    assert states(inside[:1], tokens[:1], [[1, 1, 1, 0]], asked=0) == [[0, 0, 2, 2]]


def test_forced_logits() -> None:
    abstention = Abstention(KeySpace(1, 1.0, "cpu"), "prompt-only", REFUSAL, 2, Pass())
    logits = torch.randn(2, 3, 12)
    found = abstention.forced(logits, torch.tensor([[0, 1, 2], [0, 0, 9]]))
    assert found.argmax(-1)[0, 1:].tolist() == [7, 8]
    assert found.argmax(-1)[1, 2] == 9
    assert float(found[0, 1].softmax(-1).max()) == 1
    assert torch.equal(found[:, 0], logits[:, 0])
    assert torch.equal(found[1, 1], logits[1, 1])
