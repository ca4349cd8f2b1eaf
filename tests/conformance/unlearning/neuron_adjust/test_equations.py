"""Neuron Adjust against its equations, restated in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.stats import kstest, norm

from compress.engine.adjusting import Adjuster, mirrored, probability, uniform
from compress.engine.passes import Pass
from compress.storage.checkpoint import Checkpoint

NEURONS = 24


@pytest.fixture
def statistics() -> dict[str, torch.Tensor]:
    found = {name: torch.randn(NEURONS) for name in ("forget_mean", "retain_mean")}
    found |= {name: torch.rand(NEURONS) + 0.2 for name in ("forget_deviation", "retain_deviation")}
    return {name: found[name] for name in Adjuster.STATISTICS}


def restated(x: np.ndarray, statistics: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The probability that x is replaced, and what by: float64."""
    mu_f, sigma_f, mu_r, sigma_r = (value.double().numpy() for value in statistics.values())
    n_f, n_r = norm.pdf(x, mu_f, sigma_f), norm.pdf(x, mu_r, sigma_r)
    gate = np.where(n_f >= n_r, n_f / (n_f + n_r), 0)
    return gate, mu_r - sigma_r * (x - mu_f) / sigma_f


def test_gate_and_map(statistics: dict[str, torch.Tensor]) -> None:
    x = torch.randn(500, NEURONS)
    gate, mapped = restated(x.double().numpy(), statistics)
    found = probability(x, *statistics.values()).double().numpy()
    sure = abs(gate - 0.5) > 1e-5  # where both densities are the same, either side is right
    assert np.allclose(found[sure], gate[sure], atol=1e-5)
    assert 0.1 < (gate > 0).mean() < 0.9
    assert np.allclose(mirrored(x, *statistics.values()).numpy(), mapped, atol=1e-5)


def test_densities_far_away_do_not_vanish(statistics: dict[str, torch.Tensor]) -> None:
    far = statistics["forget_mean"] + 1e4
    statistics["forget_deviation"] = statistics["retain_deviation"] * 2
    assert torch.equal(probability(far, *statistics.values()), torch.ones(NEURONS))


def test_the_ungated_map_sends_forgotten_to_retained_text(statistics: dict[str, torch.Tensor]) -> None:
    x = statistics["forget_mean"] + statistics["forget_deviation"] * torch.randn(100_000, NEURONS)
    mapped = mirrored(x, *statistics.values())
    assert torch.allclose(mapped.mean(0), statistics["retain_mean"], atol=0.02)
    assert torch.allclose(mapped.std(0), statistics["retain_deviation"], rtol=0.02)


def test_values_are_replaced_where_the_draw_says_so(statistics: dict[str, torch.Tensor]) -> None:
    adjuster = Adjuster(3, NEURONS, 7, Pass(), "cpu")
    adjuster.load_state_dict({"selected": torch.arange(NEURONS) % 3 == 0, **statistics})
    x, tokens = torch.randn(2, 50, NEURONS), torch.randint(0, 99, (2, 50))
    positions = torch.arange(50).expand(2, -1)
    gate, mapped = restated(x.double().numpy(), statistics)
    drawn = uniform(7, 3, tokens[..., None], positions[..., None], torch.arange(NEURONS)).numpy()
    expected = np.where((drawn < gate) & (np.arange(NEURONS) % 3 == 0), mapped, x.numpy())
    clear = abs(drawn - gate) > 1e-5
    found = adjuster(x, tokens, positions).numpy()
    assert np.allclose(found[clear], expected[clear], atol=1e-5)
    assert 0.05 < (found != x.numpy()).mean() < 0.3
    flat = adjuster(x.flatten(0, 1), tokens, positions)
    assert np.array_equal(flat.view(x.shape).numpy(), found)
    # Every text on its own, backwards, and as bfloat16 and float64.
    assert np.array_equal(adjuster(x.flip(0), tokens.flip(0), positions).flip(0).numpy(), found)
    assert np.array_equal(adjuster(x[:1], tokens[:1], positions[:1])[0].numpy(), found[0])
    wide = adjuster(x.double(), tokens, positions)
    assert wide.dtype == torch.float64
    assert torch.equal(wide[..., 1], x[..., 1].double())
    assert adjuster(x.bfloat16(), tokens, positions).dtype == torch.bfloat16


def test_draws_are_uniform_and_their_own() -> None:
    tokens, positions = torch.arange(40)[:, None, None], torch.arange(40)[None, :, None]
    drawn = uniform(0, 0, tokens, positions, torch.arange(50)).double()
    assert kstest(drawn.flatten().numpy(), "uniform").pvalue > 0.01
    for other in (
        uniform(1, 0, tokens, positions, torch.arange(50)),
        uniform(0, 1, tokens, positions, torch.arange(50)),
        drawn.roll(1, 0),
        drawn.roll(1, 1),
        drawn.roll(1, 2),
    ):
        joint = torch.stack([drawn.flatten(), other.double().flatten()])
        assert abs(float(torch.corrcoef(joint)[0, 1])) < 0.015


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "OPTForCausalLM"])
def test_statistics_and_selection(
    architecture: str, shared_decoder: Callable[..., Path], carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    dense = shared_decoder(architecture)
    tokenizer = hf.AutoTokenizer.from_pretrained(dense)
    model = hf.AutoModelForCausalLM.from_pretrained(dense).double().eval()
    texts = {
        "forget": [f"{'ab ' * number}text" for number in range(1, 8)],
        "retain": [f"{'xy ' * number}word {number}" for number in range(1, 9)],
    }
    seen: dict[str, list[list[np.ndarray]]] = {}
    for what, lines in texts.items():
        (tmp_path / f"{what}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
        kept: list[list[np.ndarray]] = [[], []]

        def look(index: int, x: torch.Tensor, kept: list[list[np.ndarray]] = kept) -> None:
            kept[index].append(x.detach().reshape(-1, 96).numpy())

        handles = []
        for index in range(2):
            layers = model.model.decoder.layers if "OPT" in architecture else model.model.layers
            if "OPT" in architecture:
                module, part = layers[index].fc1, slice(None)
            elif "Phi3" in architecture:
                module, part = layers[index].mlp.gate_up_proj, slice(96)
            else:
                module, part = layers[index].mlp.gate_proj, slice(None)
            handles.append(
                module.register_forward_hook(
                    lambda _, inputs, out, index=index, part=part, look=look: look(index, out[..., part])
                )
            )
        for line in lines:
            model(**tokenizer(line, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        seen[what] = kept
    sets = {what: str(tmp_path / f"{what}.jsonl") for what in texts}
    folder, step = carry_out("neuron-adjust", dense, share=0.05, **sets)
    values = {what: [np.concatenate(layer) for layer in kept] for what, kept in seen.items()}
    checkpoint = Checkpoint.open(folder)
    gaps = np.concatenate([values["forget"][i].mean(0) - values["retain"][i].mean(0) for i in range(2)])
    expected = np.zeros(192, dtype=bool)
    expected[np.argsort(-gaps)[:10]] = True
    selected = []
    for index in range(2):
        start = next(name for name in checkpoint.tensors if f"layers.{index}.neuron_adjust" in name)
        stem = start.rpartition(".")[0]
        for what in ("forget", "retain"):
            x = values[what][index]
            assert np.allclose(checkpoint.read(f"{stem}.{what}_mean"), x.mean(0), atol=1e-4)
            assert np.allclose(checkpoint.read(f"{stem}.{what}_deviation"), x.std(0), atol=1e-4)
        selected.append(checkpoint.read(f"{stem}.selected").numpy())
    assert np.array_equal(np.concatenate(selected), expected)
    assert step.details["neurons"] == 10
    stems = [f"layers.{index}.neuron_adjust" for index in range(2)]
    total = 0.0
    for index, stem in enumerate(stems):
        names = {name.rpartition(".")[2]: name for name in checkpoint.tensors if stem in name}
        found = {leaf: checkpoint.read(names[leaf]) for leaf in Adjuster.STATISTICS}
        total += restated(values["forget"][index], found)[0][:, selected[index]].sum()
    share = total / (len(values["forget"][0]) * 10)
    assert step.details["replaced"]["forget"] == pytest.approx(share, abs=1e-3)
