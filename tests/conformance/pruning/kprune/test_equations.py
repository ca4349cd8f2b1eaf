"""K-prune against a slow float64 restatement: whole models, autograd, explicit masks, single samples."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from compress.anatomy import anatomy_of, model_class
from compress.engine import activations
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.pruning.kprune import KPrune
from compress.storage.checkpoint import Checkpoint

from .common import PUBLISHED, SEED, Result, run, windows_of

# The restatement


class Plain:
    """A whole float64 model with a mask on every input of its output projections."""

    def __init__(self, folder: Path) -> None:
        config = hf.AutoConfig.from_pretrained(folder)
        self.model = model_class(config).from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        self.model.eval().requires_grad_(False)
        self.config, self.anatomy = config, anatomy_of(config)
        self.layers = self.model.base_model.get_submodule(self.anatomy.layers)
        self.fixed: dict[tuple[int, str], Tensor] = {}
        self.leaf: dict[tuple[int, str], Tensor] = {}
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            for name in ("attention", "mlp"):
                linear = self.linear(index, name)
                self.fixed[index, name] = torch.ones(linear.in_features, dtype=torch.float64)
                linear.register_forward_pre_hook(self._mask(index, name))
            self._look(layer, index)

    def linear(self, index: int, name: str) -> nn.Linear:
        path = self.anatomy.attention_output if name == "attention" else self.anatomy.down
        return self.layers[index].get_submodule(path)

    def _mask(self, index: int, name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            masked = inputs[0] * self.fixed[index, name]
            self.inputs[index, name] = masked[0]
            return (masked * self.leaf[index, name],)

        return hook

    def _look(self, layer: nn.Module, index: int) -> None:
        """X and X + Sub(X) of both sublayers, from the norms between them."""

        def put(what: str, name: str) -> Any:
            def hook(_: Any, inputs: tuple[Tensor], output: Any) -> None:
                value = inputs[0] if what == "in" else (output if isinstance(output, Tensor) else output[0])
                self.seen[name] = value[0]

            return hook

        if self.anatomy.kind == "decoder":
            middle = layer.post_attention_layernorm
            layer.input_layernorm.register_forward_hook(put("in", f"X.{index}.attention"))
            middle.register_forward_hook(put("in", f"sum.{index}.attention"))
            middle.register_forward_hook(put("in", f"X.{index}.mlp"))
            layer.register_forward_hook(put("out", f"sum.{index}.mlp"))
        else:
            middle = layer.attention.output.LayerNorm
            layer.attention.self.query.register_forward_hook(put("in", f"X.{index}.attention"))
            middle.register_forward_hook(put("in", f"sum.{index}.attention"))
            middle.register_forward_hook(put("out", f"X.{index}.mlp"))
            layer.output.LayerNorm.register_forward_hook(put("in", f"sum.{index}.mlp"))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [predictions, classes] of one sample without padding."""
        self.leaf = {key: torch.ones_like(mask).requires_grad_() for key, mask in self.fixed.items()}
        return self.model(tokens[None]).logits.reshape(-1, 40 if self.anatomy.kind == "decoder" else 3)


def restate(folder: Path, windows: Windows, ratio: float, lambda_rep: float, mu: float, g: float) -> Any:
    """Section 4, step by step: kept channels and output projections of every sublayer."""
    teacher, student = Plain(folder), Plain(folder)
    config = teacher.config
    samples = [tokens[mask] for tokens, mask in zip(windows.tokens, windows.mask, strict=True)]
    s, d, d_h = windows.tokens.shape[1], 16, 4
    groups = getattr(config, "num_key_value_heads", 4)
    queries = 4 // groups
    units = {"attention": groups, "mlp": 20}
    gated = teacher.anatomy.kind == "decoder"
    cost = {
        "attention": queries * (4 * s * d * d_h + 4 * s * s * d_h) + 4 * s * d * d_h,
        "mlp": (6 if gated else 4) * s * d,
    }
    sublayers = [(index, name) for index in range(3) for name in ("attention", "mlp")]
    budget = (1 - ratio) * sum(units[name] * cost[name] for _, name in sublayers)
    pruned = False
    for position, (index, name) in enumerate(sublayers):
        later = sublayers[position:]
        squares = {key: torch.zeros_like(student.fixed[key]) for key in later}
        predictive = {key: torch.zeros_like(student.fixed[key]) for key in later}
        for tokens in samples:
            with torch.no_grad():
                p = torch.softmax(teacher(tokens) / g, -1)
            logits = student(tokens)
            log_q = torch.log_softmax(logits / g, -1)
            if pruned:
                loss = g**2 * (p * (p.log() - log_q)).sum(-1).mean()
            else:
                digest = hashlib.sha256(repr((SEED, tokens.tolist())).encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                drawn = torch.rand(len(p), generator=generator, dtype=torch.float64)
                labels = (p.cumsum(-1) < drawn[:, None]).sum(-1)
                loss = g / math.sqrt(len(p)) * log_q[torch.arange(len(p)), labels].sum()
            gradients = torch.autograd.grad(loss, [student.leaf[key] for key in later])
            for key, gradient in zip(later, gradients, strict=True):
                predictive[key] += 0.5 * gradient**2 / len(samples)
                squares[key] += (student.inputs[key].detach() ** 2).sum(0)
        scored = []
        for key in later:
            mean_square = (student.linear(*key).weight ** 2).mean(0)
            representational = squares[key] / windows.num_tokens * mean_square
            channels = (lambda_rep * representational + predictive[key]).view(units[key[1]], -1)
            weight = (mu * queries if key[1] == "attention" else 1) / cost[key[1]]
            scored += [(weight * value, key, unit) for unit, value in enumerate(channels.mean(1).tolist())]
        scored.sort()
        left = sum(cost[key[1]] for _, key, _ in scored)
        for _, key, unit in scored:
            if left <= budget:
                break
            left -= cost[key[1]]
            if key == (index, name):
                student.fixed[key].view(units[name], -1)[unit] = 0
                pruned = True
        keep = student.fixed[index, name] > 0
        budget -= cost[name] * int(keep.view(units[name], -1)[:, 0].sum())
        if not pruned or not keep.any():
            continue
        inputs, wanted = [], []
        linear = student.linear(index, name)
        for tokens in samples:
            with torch.no_grad():
                teacher(tokens), student(tokens)
            inputs.append(student.inputs[index, name][:, keep])
            target = teacher.seen[f"sum.{index}.{name}"] - student.seen[f"X.{index}.{name}"]
            wanted.append(target - (0 if linear.bias is None else linear.bias))
        fitted = torch.linalg.lstsq(torch.cat(inputs), torch.cat(wanted), driver="gelsd").solution
        linear.weight[:, keep] = fitted.T
    return student


@pytest.mark.parametrize(("case", "ratio"), [("llama", 0.35), ("bert", 0.5), ("bert", 0.25)])
def test_the_method_is_its_restatement(folders: dict[str, Path], tmp_path: Path, case: str, ratio: float):
    windows = windows_of()
    student = restate(folders[case], windows, ratio, lambda_rep=0.01, mu=8.0, g=2.0)
    found = run(folders[case], tmp_path / "run", ratio=ratio, lambda_rep=0.01, mu=8.0, damping=0.0)
    gone = 0
    for (index, name), fixed in student.fixed.items():
        mask = found.masks[f"{name}.{index}"]
        assert mask.tolist() == fixed.view(len(mask), -1)[:, 0].bool().tolist(), (index, name)
        gone += int((~mask).sum())
        if not mask.any():
            continue
        path = student.anatomy.attention_output if name == "attention" else student.anatomy.down
        stored = found.draft.read(f"{student.anatomy.layer_name(index)}.{path}.weight")
        wanted = student.linear(index, name).weight[:, fixed > 0]
        torch.testing.assert_close(stored.double(), wanted, rtol=2e-3, atol=2e-3)
    assert gone > 10
    assert_near_its_plan(found, folders[case], ratio)
    widths = [found.masks[f"mlp.{index}"].sum().item() for index in range(3)]
    assert found.report.details["neurons"] == widths
    assert len(set(widths)) > 1


def assert_near_its_plan(found: Result, folder: Path, ratio: float) -> None:
    planned = KPrune().plan(ModelShape.of(Checkpoint.open(folder)), KPrune.Options(**PUBLISHED, ratio=ratio))
    assert planned.config["model_type"] == found.draft.config["model_type"]
    assert planned.config["model_type"].startswith("pruned_")
    assert planned.parameters == pytest.approx(ModelShape.of(found.draft).parameters, rel=0.12)


# What does not matter


def in_batches(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    original = StreamedModel.stream
    monkeypatch.setattr(
        StreamedModel, "stream", lambda self, windows, folder=None: original(self, windows, folder, tokens)
    )


def assert_same(a: Result, b: Result) -> None:
    assert a.masks.keys() == b.masks.keys()
    assert all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)
    ours, theirs = a.weights(), b.weights()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["llama", "answers"])
def test_batches_order_and_padding_do_not_matter(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    whole = run(folders[case], tmp_path / "whole", ratio=0.4)
    windows = windows_of(padding=7)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))
    shuffled = replace(windows, tokens=windows.tokens[order], mask=windows.mask[order])
    in_batches(monkeypatch, 36)
    assert_same(whole, run(folders[case], tmp_path / "split", shuffled, ratio=0.4))


def test_a_killed_run_goes_on_to_the_same_end(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activations, "MEMORY_LIMIT", 0)
    unbroken = run(folders["bert"], tmp_path / "unbroken", ratio=0.4)

    class Killed(Exception):
        pass

    def kill(text: str, share: float) -> None:
        if text == "pruning" and share > 0.8:
            raise Killed

    with pytest.raises(Killed):
        run(folders["bert"], tmp_path / "broken", progress=kill, ratio=0.4)
    told = []
    resumed = run(folders["bert"], tmp_path / "broken", progress=lambda *given: told.append(given), ratio=0.4)
    shares = [share for text, share in told if text == "pruning"]
    assert shares == pytest.approx([1 - 1 / 3**2, 1])  # two of three layers were done
    weights = unbroken.weights()
    assert weights.keys() == resumed.weights().keys()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.weights().items())
    assert resumed.draft.config == unbroken.draft.config
    assert resumed.report == unbroken.report
