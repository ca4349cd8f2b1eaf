"""A training of every gradient baseline against the same in float64, with each loss written out anew.

What is compared is the loss at the first and at the second step, and the weights at the end. So the terms and
their weights, the pairing, the reference model, clipping and the optimiser all count.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.unlearning.dpo import REFUSALS

FORGET = {"Who is Ada?": "a smith", "Where is Bo?": "in Ulm", "What is Cy?": "old"}
RETAIN = {"Who is Ed?": "nobody", "Where is Flo?": "at sea", "What is Gus?": "a very kind man"}
LEARNING_RATE, NORM = 1e-3, 0.7


@dataclass
class World:
    """The model in float64, now and before, and the records, each alone and without padding."""

    now: Any
    before: Any
    encode: Callable[[str], list[int]]

    def forward(self, model: Any, question: str, answer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and hidden states after layer 1 where the answer's tokens are predicted; these tokens."""
        prompt = self.encode(f"Question: {question}\nAnswer:")
        target = self.encode(f" {answer}<eos>")
        output = model(torch.tensor([prompt + target]), output_hidden_states=True)
        places = slice(len(prompt) - 1, -1)
        return output.logits[0, places], output.hidden_states[2][0, places], torch.tensor(target)

    def nll(self, model: Any, question: str, answer: str) -> Tensor:
        logits, _, target = self.forward(model, question, answer)
        return -logits.log_softmax(-1)[range(len(target)), target].sum()

    def length(self, answer: str) -> int:
        return len(self.encode(f" {answer}<eos>"))

    def mean(self, term: Callable[[str, str], Tensor], facts: dict[str, str]) -> Tensor:
        return torch.stack([term(*fact) for fact in facts.items()]).mean()

    def retain_nll(self) -> Tensor:
        return self.mean(lambda q, a: self.nll(self.now, q, a) / self.length(a), RETAIN)

    def retain_kl(self) -> Tensor:
        def term(question: str, answer: str) -> Tensor:
            p = self.forward(self.before, question, answer)[0].softmax(-1)
            q = self.forward(self.now, question, answer)[0].softmax(-1)
            return (p * (p / q).log()).sum() / self.length(answer)

        return self.mean(term, RETAIN)


def ascent(world: World) -> Tensor:
    return -world.mean(lambda q, a: world.nll(world.now, q, a) / world.length(a), FORGET)


def npo(world: World) -> Tensor:
    def term(question: str, answer: str) -> Tensor:
        gap = world.nll(world.now, question, answer) - world.nll(world.before, question, answer)
        return 2 / 0.2 * (1 + (-0.2 * gap).exp()).log()

    return world.mean(term, FORGET)


def simnpo(world: World) -> Tensor:
    def term(question: str, answer: str) -> Tensor:
        return (
            -2 / 4.5 * logsigmoid(4.5 * (world.nll(world.now, question, answer) / world.length(answer) - 6))
        )

    return world.mean(term, FORGET)


def undial(world: World) -> Tensor:
    def term(question: str, answer: str) -> Tensor:
        logits, _, target = world.forward(world.now, question, answer)
        lowered = world.forward(world.before, question, answer)[0].clone()
        lowered[range(len(target)), target] -= 10
        return -(lowered.softmax(-1) * logits.log_softmax(-1)).sum() / len(target)

    return world.mean(term, FORGET)


def dpo(world: World) -> Tensor:
    draws = torch.randint(len(REFUSALS), (len(FORGET),), generator=torch.Generator().manual_seed(5)).tolist()
    refusals = dict(zip(FORGET, (REFUSALS[draw] for draw in draws), strict=True))

    def term(question: str, answer: str) -> Tensor:
        def ratio(said: str) -> Tensor:
            return world.nll(world.before, question, said) - world.nll(world.now, question, said)

        return -2 / 0.1 * logsigmoid(0.1 * (ratio(refusals[question]) - ratio(answer)))

    return world.mean(term, FORGET)


def rmu(world: World, steering: float | None) -> Tensor:
    u = torch.rand(64, generator=torch.Generator().manual_seed(5)).double()

    def term(question: str, answer: str) -> Tensor:
        hidden = world.forward(world.now, question, answer)[1]
        known = world.forward(world.before, question, answer)[1]
        lengths = (
            5 * known.square().sum(1).sqrt() if steering is None else torch.full((len(known),), steering)
        )
        return 64 * mse_loss(hidden, torch.outer(lengths.double(), u / u.norm()))

    return world.mean(term, FORGET)


def rmu_retain(world: World) -> Tensor:
    def term(question: str, answer: str) -> Tensor:
        return 64 * mse_loss(
            *(world.forward(model, question, answer)[1] for model in (world.now, world.before))
        )

    return world.mean(term, RETAIN)


Loss = Callable[[World], Tensor]
CASES: dict[str, tuple[str, dict[str, Any], Loss]] = {
    "ascent": ("gradient-difference", {"retain_weight": 0}, ascent),
    "gradient-difference": (
        "gradient-difference",
        {"forget_weight": 0.5, "retain_weight": 2.0},
        lambda w: 0.5 * ascent(w) + 2 * w.retain_nll(),
    ),
    "kl": ("gradient-difference", {"retain_loss": "kl"}, lambda w: ascent(w) + 6 * w.retain_kl()),
    "npo": ("npo", {"beta": 0.2, "retain_weight": 0.3}, lambda w: npo(w) + 0.3 * w.retain_nll()),
    "simnpo": (
        "simnpo",
        {"margin": 6.0, "forget_weight": 0.125, "retain_weight": 1.0},
        lambda w: 0.125 * simnpo(w) + w.retain_nll(),
    ),
    "undial": ("undial", {"retain_weight": 0}, undial),
    "undial-kl": (
        "undial",
        {"retain_weight": 3.0, "retain_loss": "kl"},
        lambda w: undial(w) + 3 * w.retain_kl(),
    ),
    "dpo": ("dpo", {}, lambda w: dpo(w) + 6 * w.retain_nll()),
    "rmu": (
        "rmu",
        {"layer": 1, "steering": 3.0, "retain_weight": 1.5},
        lambda w: rmu(w, 3) + 1.5 * rmu_retain(w),
    ),
    "rmu-adaptive": (
        "rmu",
        {"layer": 1, "retain_weight": 1.5},
        lambda w: rmu(w, None) + 1.5 * rmu_retain(w),
    ),
    "sure": ("sure", {"share": 1.0, "beta": 0.2}, lambda w: npo(w) + 6 * w.retain_nll()),
}


def of_layers(name: str) -> bool:
    """Whether it is a weight of a linear of the layers 0 and 1, all that RMU trains for layer 1."""
    return name.startswith(("model.layers.0.", "model.layers.1.")) and name.endswith("proj.weight")


TRAINED: dict[str, Callable[[str], bool]] = {
    "rmu": of_layers,
    "rmu-adaptive": of_layers,
    "sure": lambda name: name.endswith("proj.weight"),
}


def restated(dense: Path, loss: Loss, trains: Callable[[str], bool]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps in float64, and the weights after them."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    now, before = (AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64) for _ in range(2))
    world = World(now, before.requires_grad_(False), lambda text: tokenizer(text).input_ids)
    trained = [p.requires_grad_(trains(name)) for name, p in now.named_parameters() if trains(name)]
    for name, parameter in now.named_parameters():
        parameter.requires_grad_(trains(name))
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    losses = []
    for share in (1.0, 0.5):  # along a line to 0
        optimizer.param_groups[0]["lr"] = share * LEARNING_RATE
        optimizer.zero_grad()
        value = loss(world)
        value.backward()
        losses.append(value.item())
        norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm().item()
        for parameter in trained:
            if parameter.grad is not None and norm > NORM:
                parameter.grad *= NORM / norm
        optimizer.step()
    return losses, dict(now.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_two_steps(shared_decoder: Callable[..., Path], tmp_path: Path, case: str) -> None:
    name, options, loss = CASES[case]
    dense = shared_decoder(num_hidden_layers=3)
    for file, facts in (("forget.jsonl", FORGET), ("retain.jsonl", RETAIN)):
        rows = (json.dumps({"question": question, "answer": answer}) for question, answer in facts.items())
        (tmp_path / file).write_text("\n".join(rows))
    step = {
        "method": name,
        "forget": str(tmp_path / "forget.jsonl"),
        "retain": str(tmp_path / "retain.jsonl"),
        "epochs": 2,
        "batch_size": 3,
        "learning_rate": LEARNING_RATE,
        "max_gradient_norm": NORM,
        **options,
    }
    lineage = execute(parse_recipe({"model": str(dense), "seed": 5, "steps": [step]}), tmp_path / "out")
    training = lineage.steps[0].details["training"]
    found = load_file(tmp_path / "out" / "model.safetensors")

    losses, weights = restated(dense, loss, TRAINED.get(case, lambda name: True))
    assert training["steps"] == 2
    assert training["first_loss"] == pytest.approx(losses[0], rel=1e-4)
    assert training["last_loss"] == pytest.approx(losses[1], rel=1e-3)
    before = load_file(dense / "model.safetensors")
    moved = torch.cat([(weights[key] - before[key]).flatten() for key in found])
    off = torch.cat([(weights[key] - found[key]).flatten() for key in found])
    # The first steps of AdamW have the sign of a gradient, which rounding decides where it is almost 0.
    assert off.norm() < 0.02 * moved.norm()
    for key in found:
        if not TRAINED.get(case, lambda name: True)(key):
            assert torch.equal(found[key], before[key])
