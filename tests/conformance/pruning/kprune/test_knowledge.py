"""K-prune's budgets, and what each task's predictions tell about what can go."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from compress.anatomy import model_class
from compress.engine.backward import Tape
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.pipeline.artefact import write_model
from compress.pruning.kprune import KPrune, affordable
from compress.pruning.parts.knowledge import Divergence, measure_knowledge, sublayers_of
from compress.storage.checkpoint import Checkpoint

from .common import MODELS, SEED, SIZE, Result, run, windows_of

# Budgets


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_ratio_zero_is_the_identity(folders: dict[str, Path], tmp_path: Path, case: str):
    found = run(folders[case], tmp_path / "run", ratio=0.0)
    before = Checkpoint.open(folders[case])
    assert set(found.draft.tensors) == set(before.tensors)
    assert all(torch.equal(found.draft.read(name), before.read(name)) for name in before.tensors)
    assert "pruned" not in found.draft.config


@pytest.mark.parametrize("ratio", [0.01, 0.8])  # and 0.3 of every task, below
def test_the_budget_is_met_within_one_unit(folders: dict[str, Path], tmp_path: Path, ratio: float):
    assert_within_budget(run(folders["bert"], tmp_path / "run", ratio=ratio), ratio, "bert")


def assert_within_budget(found: Result, ratio: float, case: str) -> None:
    """Within one neuron of 2 or, gated, 3 matrices."""
    details = found.report.details
    budget = details["flops_before"] * (1 - ratio)
    neuron = (6 if case == "llama" else 4) * 12 * 16
    assert budget - neuron < details["flops_after"] <= budget + 0.5


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_sublayers_can_be_emptied(folders: dict[str, Path], tmp_path: Path, case: str):
    """With heads that count for nothing, all of them go first."""
    found = run(folders[case], tmp_path / "run", ratio=0.45, mu=1e-9)
    assert 0 in found.report.details["heads"]
    write_model(found.draft, folders[case], tmp_path / "out", {})
    logits = streamed_logits(Checkpoint.open(tmp_path / "out"), windows_of())
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_some_heads_stay_however_low_their_scores(folders: dict[str, Path], tmp_path: Path, case: str):
    found = run(folders[case], tmp_path / "run", ratio=0.45, mu=1e-9, min_heads=1).report.details
    assert min(found["heads"]) == 1
    assert found["flops_after"] <= 0.55 * found["flops_before"]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(23, "11 111"), (22, "11 110"), (12, "10 110"), (11, "10 010"), (10, "00 010"), (0, "00 000")],
)
def test_the_search_drops_the_lowest_scores_until_the_rest_fits(budget: int, kept: str):
    found = affordable([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0, 0.5])], [10, 1], budget)
    assert " ".join("".join(str(int(unit)) for unit in each) for each in found) == kept


# Knowledge


def output_of(logits: Tensor, case: str) -> Any:
    if case == "answers":
        return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
    return SimpleNamespace(logits=logits)


SHAPES = {
    "llama": (12, 40),
    "bert": (3,),
    "tokens": (12, 3),
    "answers": (12, 2),
    "regression": (1,),
    "many": (3,),
}


@pytest.mark.parametrize("case", SHAPES)
def test_scores_stand_for_the_curvature_of_the_divergence(folders: dict[str, Path], case: str):
    """The mean of (1/2) score^2 over many drawings is the second-order term of the divergence."""
    config = hf.AutoConfig.from_pretrained(folders[case])
    windows = windows_of((5,))
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((1, *SHAPES[case]), generator=generator, dtype=torch.float64)
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)

    def outputs(step: Tensor) -> Any:
        return output_of(logits + step * direction, case)

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    divergence = Divergence(config, windows, 2.0, seed=0)
    teacher = output_of(logits, case)
    kl = divergence.divergences(outputs(zero), 0, teacher)
    (slope,) = torch.autograd.grad(kl, zero, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, zero)
    assert abs(slope.item()) < 1e-9  # so nothing can be learnt from the gradient of the KL itself

    terms = []
    for seed in range(800):
        score = Divergence(config, windows, 2.0, seed).scores(outputs(zero), 0)
        (gradient,) = torch.autograd.grad(score, zero)
        terms.append(0.5 * gradient.item() ** 2)
    terms = torch.tensor(terms, dtype=torch.float64)
    error = 4 * terms.std().item() / math.sqrt(len(terms)) + 1e-9
    assert terms.mean().item() == pytest.approx(0.5 * curvature.item(), abs=error)


@pytest.mark.parametrize("case", SHAPES)
def test_divergences_are_those_of_the_tasks(folders: dict[str, Path], case: str):
    config = hf.AutoConfig.from_pretrained(folders[case])
    windows = windows_of((5, 12))
    a, b = torch.randn((2, 2, *SHAPES[case]), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def kl(teacher: Tensor, student: Tensor) -> float:
        p = (teacher / 2).exp() / (teacher / 2).exp().sum()
        q = (student / 2).exp() / (student / 2).exp().sum()
        return 4 * sum(float(x * (x / y).log()) for x, y in zip(p, q, strict=True))

    wanted = 0.0
    for row, length in enumerate((5, 12)):
        t, s = a[row], b[row]
        if case in ("llama", "tokens"):
            wanted += sum(kl(t[i], s[i]) for i in range(length)) / length
        elif case == "answers":
            wanted += (kl(t[:length, 0], s[:length, 0]) + kl(t[:length, 1], s[:length, 1])) / 2
        elif case == "bert":
            wanted += kl(t, s)
        elif case == "regression":
            wanted += float((t - s) ** 2)
        else:
            zero = torch.zeros((), dtype=torch.float64)
            wanted += sum(kl(torch.stack([t[k], zero]), torch.stack([s[k], zero])) for k in range(3)) / 3
    found = Divergence(config, windows, 2.0, 0).divergences(output_of(b, case), 0, output_of(a, case))
    assert found.item() == pytest.approx(wanted)


@pytest.mark.parametrize("case", MODELS)
def test_every_task_is_pruned_and_tuning_helps(folders: dict[str, Path], tmp_path: Path, case: str):
    """What is pruned the same way predicts more like the dense model with tuned output projections."""
    windows = windows_of()
    dense = streamed_logits(Checkpoint.open(folders[case]), windows)
    errors = {}
    for tune in (True, False):
        found = run(folders[case], tmp_path / f"run-{tune}", windows, ratio=0.3, tune=tune)
        assert_within_budget(found, 0.3, case)
        write_model(found.draft, folders[case], tmp_path / f"out-{tune}", {})
        logits = streamed_logits(Checkpoint.open(tmp_path / f"out-{tune}"), windows)
        assert logits.shape == dense.shape
        errors[tune] = (logits - dense).norm()
    assert errors[True] < errors[False]


def test_key_value_heads_know_what_their_query_heads_know(folders: dict[str, Path], tmp_path: Path):
    """The same function, once with keys and values that two query heads share, once with copies of them."""
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    model.save_pretrained(shared)
    config = hf.LlamaConfig(**SIZE, num_key_value_heads=4)
    copies = hf.LlamaForCausalLM(config)
    weights = model.state_dict()
    for name, value in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = value.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    copies.load_state_dict(weights)
    copies.save_pretrained(apart)
    windows, known = windows_of(), []
    for folder in (shared, apart):
        streamed = StreamedModel(Checkpoint.open(folder))
        blocks = sublayers_of(streamed.config, 12)
        tape = Tape(streamed, streamed.stream(windows))
        known.append(measure_knowledge(tape, blocks, Divergence(streamed.config, windows, 2.0, SEED), None))
    for number, (group, heads) in enumerate(zip(*known, strict=True)):
        for kind in ("representational", "predictive"):
            found, wanted = getattr(group, kind), getattr(heads, kind)
            if number % 2 == 0:  # attention
                wanted = wanted.view(2, 2).sum(1)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


# Refusals


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Gemma2ForCausalLM", hf.Gemma2Config(**SIZE, head_dim=4), "tune: false"),
        ("BertModel", hf.BertConfig(**SIZE), "compares predictions"),
        ("LlamaForSequenceClassification", hf.LlamaConfig(**SIZE), "compares predictions"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, name: str, config: Any, message: str):
    config.architectures = [name]
    model = model_class(config)._from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    shape = ModelShape.of(Checkpoint.open(tmp_path))
    with pytest.raises(BadInput, match=message):
        KPrune().plan(shape, KPrune.Options(ratio=0.2))
    if "tune" in message:
        KPrune().plan(shape, KPrune.Options(ratio=0.2, tune=False))
