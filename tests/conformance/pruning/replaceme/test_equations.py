"""ReplaceMe's distances and maps against a float64 restatement on plain transformers models with hooks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from compress.engine.activations import Activations
from compress.engine.stream import Stream, StreamedModel
from compress.engine.windows import Windows
from compress.pruning.parts.depth import Cut
from compress.pruning.replaceme import ReplaceMe, Samples, least_squares

from .common import FAMILIES, HIDDEN, LAYERS, distances, estimate, every_family, hidden, windows_of

# The restatement.


@torch.no_grad()
def dense(folder: Path, family: str, windows: Windows) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """L_i and M_i of every layer i: float64 [N, S, D], from a plain forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    outputs, mlps = [], []
    for layer in model.get_submodule(FAMILIES[family].layers):
        layer.register_forward_hook(lambda _, __, output: outputs.append(hidden(output)))
        down = layer.get_submodule(FAMILIES[family].down)
        down.register_forward_hook(lambda _, __, output: mlps.append(output))
    model(windows.tokens, attention_mask=windows.mask.long())
    return outputs, [mlp.view(*windows.tokens.shape, -1) for mlp in mlps]


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.acos((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))) / math.pi


def rows(folder: Path, family: str, windows: Windows, cut: Cut) -> tuple[torch.Tensor, ...]:
    """M_i, Y_i and L_{i+n} of the real tokens: float64 [tokens, D]."""
    outputs, mlps = dense(folder, family, windows)
    m = mlps[cut.layer]
    return tuple(part[windows.mask] for part in (m, outputs[cut.layer] - m, outputs[cut.layer + cut.length]))


def cosine_loss(
    t: torch.Tensor, m: torch.Tensor, y: torch.Tensor, target: torch.Tensor, exact: bool
) -> torch.Tensor:
    a, b = (m @ t + y, target) if exact else (m @ t, target - y)
    return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()


def adam(folder: Path, family: str, windows: Windows, cut: Cut, options: dict[str, Any]) -> torch.Tensor:
    """Adam as Kingma and Ba write it, over the windows in the order that the seed gives."""
    all_tokens = rows(folder, family, windows, cut)
    lengths = windows.mask.sum(1).tolist()
    by_window = list(zip(*(part.split(lengths) for part in all_tokens)))
    generator = torch.Generator().manual_seed(0)
    t = torch.eye(HIDDEN, dtype=torch.float64)
    mean, square, steps = torch.zeros_like(t), torch.zeros_like(t), 0
    for _ in range(options["epochs"]):
        order = torch.randperm(len(windows), generator=generator).tolist()
        parts = [torch.cat([by_window[index][k] for index in order]) for k in range(3)]
        for batch in zip(*(part.split(options["batch_size"]) for part in parts)):
            t = t.detach().requires_grad_()
            loss = cosine_loss(t, *batch, exact=options.get("exact", False))
            loss = loss + options.get("l1", 0) * t.abs().sum() + options.get("l2", 0) * t.pow(2).sum()
            (gradient,) = torch.autograd.grad(loss, t)
            steps += 1
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            move = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
            t = t.detach() - options["learning_rate"] * move
    return t


# Selection.


@every_family
def test_distances_are_those_of_the_paper(family: str, folders: dict[str, Path], tmp_path: Path):
    """The last one is taken before the final norm."""
    windows = windows_of()
    outputs, _ = dense(folders[family], family, windows)
    last = torch.arange(len(windows)), windows.mask.sum(1) - 1
    for n, distance in ((1, "all-tokens"), (2, "last-token")):
        rows = windows.mask if distance == "all-tokens" else last
        values = [float(angle(a[rows], b[rows]).mean()) for a, b in zip(outputs, outputs[n:])]
        found = distances(folders[family], tmp_path / distance, windows, layers=n, distance=distance)
        assert found.tolist() == pytest.approx(values, abs=1e-5)
        assert min(values) > 0.02, "layers that hardly matter would make this test blind"
        if n == 1:
            model = transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float64)
            with torch.no_grad():
                result = model(windows.tokens, attention_mask=windows.mask.long(), output_hidden_states=True)
            normed = float(angle(outputs[-2], result.hidden_states[-1])[windows.mask].mean())
            assert abs(float(found[-1]) - normed) > 1e-3


# Estimation.


CUTS = [Cut(0, 1), Cut(1, 3), Cut(LAYERS - 3, 2)]


@every_family
def test_least_squares_solves_the_stacked_problem(family: str, folders: dict[str, Path], tmp_path: Path):
    windows = windows_of()
    for number, (cut, l2) in enumerate(zip(CUTS, (0.0, 3.0, 0.0), strict=True)):
        m, y, target = rows(folders[family], family, windows, cut)
        ridge = math.sqrt(l2) * torch.eye(HIDDEN, dtype=torch.float64)
        left, right = torch.cat([m, ridge]), torch.cat([target - y, torch.zeros_like(ridge)])
        expected = torch.linalg.lstsq(left, right).solution
        work = tmp_path / str(number)
        found = estimate(folders[family], work, windows, [cut], transform="least-squares", l2=l2)
        torch.testing.assert_close(found[cut.layer], expected, rtol=1e-4, atol=1e-4)


@every_family
def test_cosine_follows_adam(family: str, folders: dict[str, Path], tmp_path: Path):
    windows, cut = windows_of(), CUTS[-1]
    m, y, target = rows(folders[family], family, windows, cut)
    common = {"epochs": 3, "learning_rate": 0.01, "batch_size": 50}
    identity = torch.eye(HIDDEN, dtype=torch.float64)
    extras = ({"exact": True}, {"l1": 0.01}, {"l2": 0.01})  # whose terms have nothing of the architecture
    for number, extra in enumerate(({}, extras[list(FAMILIES).index(family) % 3])):
        options = common | extra
        found = estimate(folders[family], tmp_path / str(number), windows, [cut], **options)[cut.layer]
        expected = adam(folders[family], family, windows, cut, options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        exact = "exact" in extra
        assert cosine_loss(found, m, y, target, exact) < cosine_loss(identity, m, y, target, exact)


def test_regularisation_makes_the_map_smaller(folders: dict[str, Path], tmp_path: Path):
    def size(name: str, **options: Any) -> float:
        common = {"epochs": 20, "learning_rate": 0.01, "batch_size": 50}
        found = estimate(folders["llama"], tmp_path / name, windows_of(), [CUTS[1]], **common, **options)
        return float(found[CUTS[1].layer].abs().sum())

    assert size("l1", l1=0.01) < size("none") - 1
    assert size("l2", l2=0.01) < size("none again") - 1


def samples_of(m: torch.Tensor, y: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> Samples:
    def held(values: torch.Tensor) -> Activations:
        activations = Activations(tuple(values.shape), None)
        activations.write(0, values)
        return activations

    windows = Windows(mask.long(), mask, source="made up")
    return Samples(held(m), held(y), SimpleNamespace(hidden=held(target), windows=windows), "cpu")


def test_least_squares_recovers_a_map_that_exists():
    generator = torch.Generator().manual_seed(3)
    m, y = torch.randn(2, 5, 12, HIDDEN, generator=generator)
    wanted = torch.randn(HIDDEN, HIDDEN, generator=generator)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    target = torch.where(mask[..., None], m @ wanted + y, 1e6)  # padding holds rubbish
    options = ReplaceMe.Options(layers=1, transform="least-squares")
    found = least_squares(samples_of(m, y, target, mask), options, torch.Generator())
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-5)


def test_least_squares_where_the_mlp_writes_into_few_directions():
    generator = torch.Generator().manual_seed(4)
    m, y, target = torch.randn(3, 5, 12, HIDDEN, generator=generator)
    m[..., HIDDEN // 2 :] = 0  # the Gram is singular
    mask = torch.ones(5, 12, dtype=torch.bool)
    options = ReplaceMe.Options(layers=1, transform="least-squares")
    found = least_squares(samples_of(m, y, target, mask), options, torch.Generator())
    left, right = m.flatten(0, 1).double(), (target - y).flatten(0, 1).double()
    torch.testing.assert_close(found, torch.linalg.pinv(left) @ right, rtol=0, atol=1e-6)


# What the estimates must not depend on.


# Positions are relative in one family and learned in the other; what estimates the map sees neither.
@pytest.mark.parametrize(("family", "transform"), [("llama", "cosine"), ("opt", "least-squares")])
def test_padding_and_batch_size_change_nothing(
    family: str,
    transform: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    cuts = [Cut(0, 2), Cut(3, 1)]
    options = {"transform": transform}
    if transform == "cosine":
        options |= {"epochs": 3, "learning_rate": 0.01, "batch_size": 50}

    def everything(name: str, windows: Windows) -> list[torch.Tensor]:
        found = [
            distances(folders[family], tmp_path / name / distance, windows, layers=2, distance=distance)
            for distance in ("last-token", "all-tokens")
        ]
        return found + list(
            estimate(folders[family], tmp_path / name / "T", windows, cuts, **options).values()
        )

    before = everything("before", windows_of())
    for one, other in zip(before, everything("padded", windows_of(width=21))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    stream = StreamedModel.stream
    sizes = []

    def one_by_one(self: StreamedModel, windows: Windows, folder: Path | None = None) -> Stream:
        made = stream(self, windows, folder, batch_tokens=1)
        sizes.append(made.batch_size)
        return made

    monkeypatch.setattr(StreamedModel, "stream", one_by_one)
    for one, other in zip(before, everything("one by one", windows_of())):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert sizes == [1, 1, 1]
