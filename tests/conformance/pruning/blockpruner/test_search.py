"""BlockPruner's search against a plain greedy loop in float64 on transformers models with hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.calibration.statistics.losses import precise_losses, streamed_losses
from compress.engine import activations
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.pruning.parts import block_losses
from compress.pruning.parts.block_losses import Bound
from compress.pruning.parts.blocks import Block, layer_parameters
from compress.storage.checkpoint import Checkpoint

from .common import (
    LAYERS,
    VOCAB,
    Plain,
    Removed,
    applied,
    assert_same,
    every_case,
    greedy,
    order,
    parameters_of,
    plan,
    windows_of,
)


@every_case
def test_the_removals_are_those_of_the_plain_loop(
    case: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], three_removed: Removed
):
    plain = plain_of(case)
    report, run = three_removed(case)
    assert_same(order(report), greedy(plain, 3))
    assert report.details["removed"][0]["before"] == pytest.approx(plain.perplexity([]), rel=2e-6)
    # What was written has the perplexity that the search found.
    written = streamed_losses(StreamedModel(run.draft), windows_of([16] * 3))
    expected = Plain(case, folders[case], windows_of([16] * 3)).losses([block for block, _ in order(report)])
    assert float(written.mean()) == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.parametrize(("case", "mode"), [("llama", "attention"), ("gpt_neox", "mlp")])
def test_modes(
    case: str, mode: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], tmp_path: Path
):
    plain = plain_of(case)
    report, _ = applied(folders[case], tmp_path, blocks=2, mode=mode)
    assert_same(order(report), greedy(plain, 2, parts=[mode]))


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_cost_in_parameters(
    case: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], tmp_path: Path
):
    plain = plain_of(case)
    expected = greedy(plain, 3, parameters=parameters_of(folders[case]))
    report, _ = applied(folders[case], tmp_path / "found", blocks=3, cost="parameters")
    assert_same(order(report), expected)


def test_the_costs_choose_differently(folders: dict[str, Path], plain_of: Callable[[str], Plain]):
    """So that the test above is not the one before it."""
    plain = plain_of("llama")
    assert greedy(plain, 3) != greedy(plain, 3, parameters=parameters_of(folders["llama"]))


@pytest.mark.parametrize("case", ["llama", "gemma2", "opt, post-norm"])
def test_memory_batches_and_padding_change_nothing(
    case: str,
    folders: dict[str, Path],
    three_removed: Removed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    before = order(three_removed(case)[0])[:2]
    padded, _ = applied(folders[case], tmp_path / "padded", windows_of(width=21), blocks=2)
    assert_same(order(padded), before)

    monkeypatch.setattr(activations, "MEMORY_LIMIT", 1)  # a window at a time, and its hidden states in files
    monkeypatch.setattr(block_losses, "CHUNK_ELEMENTS", 3 * VOCAB)
    stream, spilled = StreamedModel.stream, []

    def one_by_one(self: StreamedModel, windows: Windows, folder: Path | None = None) -> Any:
        made = stream(self, windows, folder, batch_tokens=1)
        spilled.append(made.hidden.spilled and len(windows) == 1)
        return made

    monkeypatch.setattr(StreamedModel, "stream", one_by_one)
    small, _ = applied(folders[case], tmp_path / "small", blocks=2)
    assert_same(order(small), before)
    assert len(spilled) >= 2 * 7
    assert all(spilled)


def test_few_losses_need_the_whole_vocabulary(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Any] = []
    init = block_losses.BlockLosses.__init__
    monkeypatch.setattr(
        block_losses.BlockLosses,
        "__init__",
        lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1],
    )
    monkeypatch.setattr(block_losses, "LIKELY_TOKENS", 24)
    applied(folders["llama"], tmp_path, blocks=3)
    assert sum(int(losses.exact.all(1).sum()) for losses in made) <= 5  # of 6 + 5 + 4 blocks
    for losses in made:
        assert losses.exact.any(1).sum() < len(losses.blocks)


# The bound.


class Vocabulary:
    """What `Bound` needs of a head: a projection, and what it is given."""

    def __init__(self, projection: nn.Linear, cap: float | None = None) -> None:
        self.projection, self.cap = projection, cap

    def features(self, hidden: Tensor) -> Tensor:
        return hidden

    def __call__(self, hidden: Tensor) -> Any:
        logits = self.projection(hidden)
        return SimpleNamespace(
            logits=logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        )


@given(
    tokens=st.integers(2, 40),
    width=st.integers(1, 12),
    likely=st.integers(1, 50),
    bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    far=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 2**20),
)
# The mass of all tokens but the likely ones is below the normal numbers here, and cannot be divided by.
@example(tokens=2, width=8, likely=1, bias=False, scale=10.0, far=3.0, seed=51981)
def test_a_bound_is_below_the_loss_and_near_it_where_the_models_agree(
    tokens: int, width: int, likely: int, bias: bool, scale: float, far: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    head = Vocabulary(nn.Linear(width, tokens, bias=bias).requires_grad_(False))
    head.projection.weight.data = scale * torch.randn(tokens, width, generator=generator)
    hidden = torch.randn(7, width, generator=generator)
    targets = torch.randint(0, tokens, (7,), generator=generator)
    branch = hidden + far * torch.randn(3, 7, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_losses, "LIKELY_TOKENS", likely)
        bound = Bound(head, hidden, targets)
    found = bound.of(branch)
    losses = [nn.functional.cross_entropy(head.projection(one).double(), targets) for one in branch]
    expected = torch.stack(losses)
    tolerance = 1e-5 * (1 + float(expected.abs().max()))
    assert bound.loss == pytest.approx(
        float(nn.functional.cross_entropy(head.projection(hidden).double(), targets)), abs=tolerance
    )
    assert bool((found <= expected + tolerance).all())
    if far == 0:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_there_is_no_bound_for_capped_logits():
    projection = nn.Linear(4, 30).requires_grad_(False)
    hidden, targets = torch.randn(9, 4), torch.arange(9)
    assert Bound(Vocabulary(projection), hidden, targets).holds
    assert not Bound(Vocabulary(projection, cap=1.0), hidden, targets).holds


def test_losses_over_a_large_vocabulary_are_right_to_a_millionth():
    logits = 5 * torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0)) + 20
    targets = torch.arange(4)
    exact = nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(precise_losses(logits, targets), exact, atol=5e-6, rtol=0)


# Targets.


def test_until_a_share_of_the_parameters_is_left(folders: dict[str, Path], tmp_path: Path):
    folder = folders["llama"]
    sizes, total = parameters_of(folder), layer_parameters(ModelShape.of(Checkpoint.open(folder)))
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert total == sum(parameter.numel() for parameter in model.model.layers.parameters())
    norms = model.model.layers[0].input_layernorm.weight.numel()
    attention = sum(parameter.numel() for parameter in model.model.layers[0].self_attn.parameters())
    assert sizes[Block(0, "attention")] == attention + norms
    report, run = applied(folder, tmp_path, ratio=0.3)
    kept = [removal["kept"] for removal in report.details["removed"]]
    assert kept[-1] <= 0.7 < kept[-2]
    left = layer_parameters(ModelShape.of(run.draft))
    assert kept[-1] == pytest.approx(left / total)
    whole, _ = applied(folder, tmp_path / "again", blocks=len(kept))
    assert order(whole) == order(report)


def test_until_the_perplexity_is_reached(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    folder, plain = folders["llama"], Plain("llama", folders["llama"], likely)
    expected = greedy(plain, 3)
    dense, first, second, third = plain.perplexity([]), *(value for _, value in expected)
    assert dense < first < second < third
    report, _ = applied(folder, tmp_path / "two", likely, max_perplexity=(second + third) / 2)
    assert_same(order(report), expected[:2])
    report, run = applied(folder, tmp_path / "none", likely, max_perplexity=(dense + first) / 2)
    assert report.details["removed"] == []
    assert "removed nothing" in report.summary
    assert run.draft.config == Checkpoint.open(folder).config
    with pytest.raises(BadInput, match="before anything is removed"):
        applied(folder, tmp_path / "refused", likely, max_perplexity=dense * 0.999)


def test_the_last_attention_stays(folders: dict[str, Path], tmp_path: Path):
    report, run = applied(folders["llama"], tmp_path, blocks=2 * LAYERS - 1)
    assert len(order(report)) == 2 * LAYERS - 1
    assert ModelShape.of(run.draft).num_layers == 1
    with pytest.raises(BadInput, match=r"at most 5 blocks .* leaves"):
        plan(folders["llama"], blocks=2 * LAYERS)
    with pytest.raises(BadInput, match="at most 2 attention blocks"):
        plan(folders["llama"], ratio=0.9, mode="attention")
    assert plan(folders["llama"], blocks=LAYERS, mode="mlp").num_layers == LAYERS
