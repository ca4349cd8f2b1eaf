"""BitStack against the paper's equations in float64 with full SVDs, and its order against plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from compress.calibration.statistics.losses import streamed_losses
from compress.engine.stream import Seen, StreamedModel
from compress.engine.windows import Windows
from compress.kernels.layers.stacked import FactorStack, StackBlock
from compress.method import StepContext
from compress.quantization.bitstack import BitStack, ColumnNorms, decompose, low_rank
from compress.quantization.parts.block_order import expected_losses, perplexities
from compress.quantization.parts.stacker import Stacker
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.stacks import BitStackFormat, with_blocks

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def problem(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with some structure in its magnitudes, and scales of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(size, generator=generator) + 0.2 for size in (out, width))
    weight = torch.randn(out, width, generator=generator) * rows[:, None] * columns
    return weight, torch.rand(width, generator=generator) * 30 + 0.1


def restated(weight: Tensor, scale: Tensor, blocks: int, rank: int) -> list[Tensor]:
    """The weight after 1, 2, ... blocks, float64, without any rounding of the factors."""
    left = weight.double() @ torch.diag(scale.double())
    total, found = torch.zeros_like(left), []
    for _ in range(blocks):
        signs = torch.where(left < 0, -1.0, 1.0).double()
        u, s, v = torch.linalg.svd(left.abs(), full_matrices=False)
        block = signs * ((u[:, :rank] * s[:rank].sqrt()) @ (s[:rank].sqrt()[:, None] * v[:rank]))
        left, total = left - block, total + block
        found.append(total @ torch.diag(1 / scale.double()))
    return found


def partial_sums(blocks: list[dict[str, Tensor]], out: int, width: int) -> list[Tensor]:
    stack = FactorStack(width, out, [StackBlock(block) for block in blocks])
    return [stack.dense(slice(0, count + 1)).double() for count in range(len(blocks))]


@pytest.mark.parametrize(("out", "width"), [(24, 40), (40, 20), (17, 13)])
def test_blocks_where_the_random_basis_spans_everything(out: int, width: int) -> None:
    weight, scale = problem(out, width)
    blocks = decompose(weight, scale, blocks=4, rank=9, generator=torch.Generator().manual_seed(0))
    norm = weight.norm()
    pairs = zip(partial_sums(blocks, out, width), restated(weight, scale, 4, 9), strict=True)
    for number, (found, expected) in enumerate(pairs):
        # Signs of values near zero follow the rounding of the factors, so blocks part slowly.
        assert float((found - expected).norm()) < 1e-3 * 3**number * float(norm)


def test_residuals_on_larger_weights_are_within_one_percent() -> None:
    weight, scale = problem(160, 224)
    blocks = decompose(weight, scale, blocks=6, rank=16, generator=torch.Generator().manual_seed(0))
    pairs = zip(partial_sums(blocks, 160, 224), restated(weight, scale, 6, 16), strict=True)
    norms = [((weight - a) * scale).norm() / ((weight - b) * scale).norm() for a, b in pairs]
    assert all(0.99 < float(ratio) < 1.01 for ratio in norms)


def test_each_block_makes_up_for_the_rounding_of_those_before_it() -> None:
    """With the factors of full rank, a block is what float16 made of the residual."""
    weight, scale = problem(12, 12)
    blocks = decompose(weight, scale, blocks=3, rank=12, generator=torch.Generator().manual_seed(0))
    errors = [float((weight - part).norm() / weight.norm()) for part in partial_sums(blocks, 12, 12)]
    assert errors[0] < 2e-3
    assert errors[2] < 2e-3 * errors[0]


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_size_of_the_inputs_does_not_matter(factor: float) -> None:
    weight, scale = problem(20, 30)
    first, second = (
        decompose(weight, scale * size, blocks=2, rank=5, generator=torch.Generator().manual_seed(0))
        for size in (1.0, factor)
    )
    for one, other in zip(partial_sums(first, 20, 30), partial_sums(second, 20, 30), strict=True):
        assert float((one - other).norm()) < 2e-3 * float(weight.norm())


def test_a_weight_of_zeros() -> None:
    blocks = decompose(torch.zeros(6, 9), torch.ones(9), 2, 3, torch.Generator().manual_seed(0))
    assert not partial_sums(blocks, 6, 9)[1].any()


def test_the_randomised_svd_has_the_factors_of_the_svd() -> None:
    matrix = problem(30, 40)[0].abs()
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, right = low_rank(matrix, 3, torch.Generator().manual_seed(0))
    signs = (left.double() * u[:, :3]).sum(0).sign()
    assert torch.allclose(left.double() * signs, u[:, :3] * s[:3].sqrt(), atol=1e-3)
    assert torch.allclose(right.double() * signs[:, None], s[:3].sqrt()[:, None] * v[:3], atol=1e-3)


def test_scales_leave_padding_out_and_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 7, 3, generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [3], [7], [1], [5]])
    expected = torch.stack([x[m].norm(dim=0) for x, m in zip(inputs.double(), mask, strict=True)]).mean(0)
    for size in (1, 2, 5):
        norms = ColumnNorms()
        for start in range(0, 5, size):
            part = slice(start, start + size)
            norms.add(Seen(inputs[part], inputs[part], mask[part], start))
        assert torch.allclose(norms.scale.double(), expected + 1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def prepared(
    folder: Path, blocks: int = 3, **options: object
) -> tuple[StreamedModel, Stacker, StepContext, BitStack.Options]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG["vocab_size"], (6, 20), generator=generator)
    mask = torch.arange(20) < torch.tensor([[20], [20], [12], [20], [5], [20]])
    checkpoint = Checkpoint.open(folder)
    work = folder.parent / "work"
    run = StepContext(
        Draft(checkpoint, work), Windows(tokens, mask, "random"), 0, work, "cpu", lambda *_: None
    )
    model = StreamedModel(checkpoint)
    chosen = BitStack.Options(blocks=blocks, rank=2, **options)
    BitStack().apply(model, chosen, run)
    run.draft.flush("step")
    return model, Stacker(run.draft, chosen, BitStackFormat(blocks, 2), {}), run, chosen


def test_the_inputs_that_scale_a_weight_are_its_own(folder: Path) -> None:
    """The whole method on a model, against hooks on transformers' own one."""
    _, stacker, run, _ = prepared(folder)
    model = hf.LlamaForCausalLM.from_pretrained(folder).double()
    inputs: dict[str, Tensor] = {}
    for name in stacker.modules:
        model.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: inputs.update({name: given[0]})
        )
    with torch.no_grad():
        model(run.calibration.tokens, attention_mask=run.calibration.mask)
    for name in stacker.modules:
        weight = model.get_submodule(name).weight.detach()
        scale = torch.stack(
            [x[m].norm(dim=0) for x, m in zip(inputs[name], run.calibration.mask, strict=True)]
        ).mean(0)
        expected = restated(weight, scale + 1e-3, 1, 2)[0]
        form = BitStackFormat(3, 2)
        stack = form.module(name, tuple(weight.shape), run.draft, None)
        found = stack.dense(slice(0, 1)).double()
        assert float((found - expected).norm()) < 2e-3 * float(expected.norm())


def test_expected_losses_are_the_diagonal_of_the_fisher_information(folder: Path) -> None:
    model, stacker, run, _ = prepared(folder)
    found = expected_losses(model, stacker, run.calibration, run)

    dense = hf.LlamaForCausalLM.from_pretrained(folder).double()
    squares = {name: torch.zeros_like(dense.get_submodule(name).weight) for name in stacker.modules}
    for index, (tokens, mask) in enumerate(zip(run.calibration.tokens, run.calibration.mask, strict=True)):
        dense.zero_grad()
        logits = dense(tokens[None], attention_mask=mask[None]).logits[0]
        drawn = torch.multinomial(
            logits.detach().float().softmax(-1), 1, generator=torch.Generator().manual_seed(index)
        )[:, 0]
        torch.nn.functional.cross_entropy(logits[mask], drawn[mask], reduction="sum").backward()
        for name, square in squares.items():
            square += dense.get_submodule(name).weight.grad.square()
    for name in stacker.modules:
        weight = dense.get_submodule(name).weight.detach()
        stack = stacker.form.module(name, tuple(weight.shape), run.draft, None)
        for count in (1, 2, 3):
            left = weight - stack.dense(slice(0, count)).double()
            expected = (squares[name] * left.square()).sum() / (2 * run.calibration.mask.sum())
            assert float(found[name][count - 1]) == pytest.approx(float(expected), rel=1e-3)


def test_perplexities_are_those_of_models_with_one_more_block(folder: Path) -> None:
    _, stacker, run, _ = prepared(folder, blocks=2)
    found = perplexities(stacker, run.calibration, run)
    assert found.shape == (1, len(stacker.modules))
    for number in (0, 6, 9, 13):
        counts = dict.fromkeys(stacker.modules, 1) | {stacker.modules[number]: 2}
        raised = StreamedModel(with_blocks(run.draft, run.draft.config, counts))
        expected = float(streamed_losses(raised, run.calibration).mean().exp())
        assert float(found[0, number]) == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_sweep_goes_on_after_the_last_level(folder: Path, monkeypatch) -> None:
    from compress.quantization.parts import block_order as order

    _, stacker, run, _ = prepared(folder)
    expected = perplexities(stacker, run.calibration, run)
    calls = []
    monkeypatch.setattr(order, "_raised", lambda *_: calls.append(1))
    assert torch.equal(perplexities(stacker, run.calibration, run), expected)
    assert not calls
