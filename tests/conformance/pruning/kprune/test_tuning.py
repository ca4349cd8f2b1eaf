"""K-prune's tuning of what stays: least squares, and the damping that holds on other text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.engine.logits import streamed_logits
from compress.errors import BadInput
from compress.pipeline.artefact import write_model
from compress.pruning.parts.refit import Fit, choose_damping, halves_of
from compress.storage.checkpoint import Checkpoint

from .common import run, windows_of


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit_of(a: Tensor, y: Tensor, present: Tensor) -> Fit:
    fit = Fit(present)
    for rows in range(0, len(a), 4):
        fit.add(a[rows : rows + 4], y[rows : rows + 4])
    return fit


def test_of_several_solutions_the_nearest_is_taken():
    a, y, present = normal(6, 9), normal(6, 4, seed=1), normal(9, 4, seed=2)
    a[:, 3] = 0  # a neuron that is never active
    fit = fit_of(a, y, present)
    assert not fit.regular
    found = fit.solve(0.0)
    torch.testing.assert_close(a @ found, y)
    torch.testing.assert_close(found, present + torch.linalg.pinv(a) @ (y - a @ present))
    torch.testing.assert_close(found[3], present[3])


def test_one_solution_is_plain_least_squares():
    a, y = normal(20, 9), normal(20, 4, seed=1)
    fit = fit_of(a, y, normal(9, 4, seed=2))
    assert fit.regular
    torch.testing.assert_close(fit.solve(0.0), torch.linalg.lstsq(a, y).solution)


@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_the_damping_holds_to_the_present(rows: int, damping: float):
    a, y, present = normal(rows, 9), normal(rows, 4, seed=1), normal(9, 4, seed=2)
    root = math.sqrt(damping * float(a.square().sum(0).mean()))
    more = torch.cat([a, root * torch.eye(9, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(more, torch.cat([y, root * present])).solution
    fit = fit_of(a, y, present)
    torch.testing.assert_close(fit.solve(damping), wanted)
    gain = (a @ present - y).square().sum() - (a @ wanted - y).square().sum()
    assert fit.gain(wanted) == pytest.approx(gain.item())


@pytest.mark.parametrize(
    ("rows", "noise", "dampings"),
    [(400, 0.0, {0.0}), (40, 4.0, {0.1, 1.0}), (6, 1.0, {0.1, 1.0}), (40, 30.0, {None})],
    ids=["enough", "noisy", "few", "nothing but noise"],
)
def test_the_damping_is_the_one_that_holds_on_other_text(
    rows: int, noise: float, dampings: set[float | None]
):
    """The outputs follow from a W near the present one, and from what the kept channels do not know."""
    present = normal(24, 5)
    wanted = present + 0.5 * normal(24, 5, seed=1)

    def text(seed: int, rows: int = rows) -> tuple[Tensor, Tensor]:
        a = normal(rows, 24, seed=seed)
        return a, a @ wanted + noise * normal(rows, 5, seed=seed + 1)

    fits = [fit_of(*text(seed), present) for seed in (3, 5)]
    damping = choose_damping(fits)
    assert damping in dampings
    if damping:
        fresh = fit_of(*text(7, 2000), present)
        both = fits[0] + fits[1]
        assert fresh.gain(both.solve(damping)) > max(0.0, fresh.gain(both.solve(0.0)))


def test_halves_do_not_depend_on_the_order():
    windows = windows_of()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))
    shuffled = replace(windows, tokens=windows.tokens[order], mask=windows.mask[order])
    halves = halves_of(windows)
    assert halves.sum() == len(windows) // 2
    assert torch.equal(halves[order], halves_of(shuffled))


def test_tuning_is_not_worse_on_other_text(folders: dict[str, Path], tmp_path: Path):
    """Two windows of 12 tokens for 16 and 20 channels: plain least squares fits them, and breaks the rest."""
    few, other = windows_of((12, 12)), windows_of()
    dense = streamed_logits(Checkpoint.open(folders["llama"]), other)
    errors = {}
    for name, options in {"chosen": {}, "plain": {"damping": 0.0}, "none": {"tune": False}}.items():
        found = run(folders["llama"], tmp_path / f"run-{name}", few, ratio=0.3, **options)
        write_model(found.draft, folders["llama"], tmp_path / f"out-{name}", {})
        logits = streamed_logits(Checkpoint.open(tmp_path / f"out-{name}"), other)
        errors[name] = (logits - dense)[2:].norm()
    assert errors["chosen"] < errors["plain"]
    assert errors["chosen"] < 1.05 * errors["none"]


def test_one_window_cannot_be_held_out(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="set damping"):
        run(folders["llama"], tmp_path / "run", windows_of((12,)), ratio=0.3)
    run(folders["llama"], tmp_path / "held", windows_of((12,)), ratio=0.3, damping=0.1)
