"""ApiQ against its equations restated in float64, with tokens and groups one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.calibration.statistics.fisher import Fisher, text_loss
from compress.calibration.statistics.hessian import Hessian
from compress.engine.activations import Activations
from compress.engine.stream import Seen, StreamedModel
from compress.engine.windows import Windows
from compress.kernels.codes.integer import quantize_weight
from compress.method import StepContext
from compress.quantization import apiq
from compress.quantization.apiq import ApiQ, Learning
from compress.quantization.parts import clipped
from compress.quantization.parts.clipped import ADAPTER_DECAY, ClippedLinear, descent
from compress.quantization.parts.linear_losses import LinearLoss, cross_products
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.table import Formats

OUT, WIDTH, SIZE, RANK, ALPHA = 6, 32, 8, 3, 6.0


def linear(seed: int = 0, bits: int = 2, symmetric: bool = False, dtype: torch.dtype = torch.float32, **more):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(OUT, WIDTH, generator=generator)
    made = ClippedLinear(
        dense,
        RANK,
        ALPHA,
        bits=bits,
        group_size=SIZE,
        symmetric=symmetric,
        scale_dtype=dtype,
        adapter_dtype=torch.float32,
        generator=generator,
        name="w",
        **more,
    )
    shape = made.u.shape
    made.load(
        {
            "u": torch.randn(shape, generator=generator) + 1,
            "l": torch.randn(shape, generator=generator) + 1,
            "B": 0.1 * torch.randn(OUT, RANK, generator=generator),
        }
    )
    return made


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scale_and_zero(
    group: list[float], upper: float, lower: float, bits: int, symmetric: bool
) -> tuple[float, int]:
    """s and z of a group before s is rounded: section 2 of the specification, and its symmetric grid."""
    high, low = sigmoid(upper) * max(*group, 0.0), sigmoid(lower) * min(*group, 0.0)
    if symmetric:
        return -max(high, low, key=abs) / 2 ** (bits - 1), 2 ** (bits - 1)
    scale = (high - low) / (2**bits - 1)
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def each_group(made: ClippedLinear):
    for row in range(OUT):
        for number in range(WIDTH // SIZE):
            columns = slice(number * SIZE, (number + 1) * SIZE)
            group = made.weight[row, columns].double().tolist()
            yield row, columns, number, group, made.u[row, number].item(), made.l[row, number].item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clipped_grid(bits: int, symmetric: bool) -> None:
    made = linear(bits=bits, symmetric=symmetric)
    expected = torch.zeros(OUT, WIDTH, dtype=torch.float64)
    for row, columns, _, group, upper, lower in each_group(made):
        scale, zero = scale_and_zero(group, upper, lower, bits, symmetric)
        codes = [min(max(round(w / scale) + zero, 0), 2**bits - 1) for w in group]
        expected[row, columns] = torch.tensor([scale * (code - zero) for code in codes], dtype=torch.float64)

    assert torch.allclose(made.quantized().double(), expected, atol=1e-6)
    low_rank = made.B.double() @ made.A.double()
    assert torch.allclose(made.adapted(made.quantized()).double(), expected + 2 * low_rank, atol=1e-6)
    assert torch.allclose(made.stored().double(), expected + 2 * low_rank, atol=1e-6)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_what_is_trained_is_what_is_stored(bits, symmetric, dtype, seed) -> None:
    made = linear(seed, bits, symmetric, dtype)
    assert torch.equal(made.quantized(), made.rounded().dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_nothing_clipped_and_no_adapter_is_plain_rounding(bits, symmetric, dtype) -> None:
    made = linear(1, bits, symmetric, dtype)
    made.load(made.plain())
    plain = quantize_weight(made.weight, bits, SIZE, symmetric, dtype)
    assert made.rounded().same_as(plain)
    assert torch.equal(made.stored(), plain.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradient_of_the_clipping(bits: int, symmetric: bool) -> None:
    """Finite differences of the function that straight-through rounding differentiates: what rounding adds to
    W / s, and which weights are clamped, stay what they are."""
    made = linear(2, bits, symmetric)
    upstream = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3))
    (made.quantized() * upstream).sum().backward()

    def surrogate(group, upper, lower, at_upper, at_lower, wanted) -> float:
        begin, zero = scale_and_zero(group, at_upper, at_lower, bits, symmetric)
        scale, _ = scale_and_zero(group, upper, lower, bits, symmetric)
        total = 0.0
        for w, up in zip(group, wanted, strict=True):
            code = round(w / begin) + zero
            if 0 <= code <= 2**bits - 1:
                total += up * scale * (w / scale + (round(w / begin) - w / begin))
            else:
                total += up * scale * ((0 if code < 0 else 2**bits - 1) - zero)
        return total

    step = 1e-5
    for row, columns, number, group, upper, lower in each_group(made):
        wanted = upstream[row, columns].double().tolist()
        by_u = [surrogate(group, upper + d, lower, upper, lower, wanted) for d in (step, -step)]
        by_l = [surrogate(group, upper, lower + d, upper, lower, wanted) for d in (step, -step)]
        assert float(made.u.grad[row, number]) == pytest.approx((by_u[0] - by_u[1]) / (2 * step), abs=2e-5)
        assert float(made.l.grad[row, number]) == pytest.approx((by_l[0] - by_l[1]) / (2 * step), abs=2e-5)


def test_the_gradient_of_clamped_weights_is_that_of_the_real_function() -> None:
    made = linear(4, bits=2)
    rounded = made.rounded()
    scale = rounded.scales.double().repeat_interleave(SIZE, 1)
    code = (made.weight.double() / scale).round() + rounded.zeros.repeat_interleave(SIZE, 1)
    clamped = (code < 0) | (code > 3)
    assert clamped.sum() > 10
    (made.quantized() * clamped).sum().backward()
    for row, columns, number, group, upper, lower in each_group(made):
        values = []
        for moved in (upper + 1e-5, upper - 1e-5):
            scale_, zero = scale_and_zero(group, moved, lower, 2, False)
            codes = [min(max(round(w / scale_) + zero, 0), 3) for w in group]
            values.append(
                sum(
                    scale_ * (c - zero)
                    for c, there in zip(codes, clamped[row, columns], strict=True)
                    if there
                )
            )
        assert float(made.u.grad[row, number]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-5)


# The loss of a linear


def streams(seed: int = 5, windows: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """X, X_q [N, S, in], and a mask with padding."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(windows, length, WIDTH, generator=generator)
    mask = torch.ones(windows, length, dtype=torch.bool)
    mask[1, 4:] = False
    return dense, dense + 0.3 * torch.randn(dense.shape, generator=generator), mask


def linear_loss(made: ClippedLinear) -> tuple[LinearLoss, Tensor, Tensor]:
    dense, given, mask = streams()
    store = Activations(tuple(dense.shape), None)
    store.write(0, dense)
    hessian = Hessian(store)
    for start in (0, 2):
        hessian.add(Seen(given[start : start + 2], given, mask[start : start + 2], start))
    rows, quantized = dense[mask].double(), given[mask].double()
    energy = float((rows @ made.weight.double().T).square().sum())
    return LinearLoss(made.weight, hessian, cross_products(made.weight, hessian), energy), rows, quantized


def test_two_gram_matrices_hold_the_loss_and_its_gradient() -> None:
    made = linear(6)
    loss, rows, quantized = linear_loss(made)
    whole = made.stored().double().requires_grad_()
    explicit = (rows @ made.weight.double().T - quantized @ whole.T).square().mean()
    explicit.backward()
    value, gradient = loss.gradient(whole.detach().float())

    assert loss.exact(whole.detach()) == pytest.approx(explicit.item(), rel=1e-5)
    assert value == pytest.approx(explicit.item(), rel=1e-5)
    assert torch.allclose(gradient.double(), whole.grad, atol=1e-6)


def learning(made: ClippedLinear, **options) -> Learning:
    options = ApiQ.Options(bits=2, group_size=SIZE, rank=RANK, alpha=ALPHA, **options)
    fisher = {"w": torch.rand(OUT, WIDTH, generator=torch.Generator().manual_seed(7))}
    return Learning(None, None, {"w": made}, None, None, fisher, options, None, lambda path, linear: None)


@pytest.mark.parametrize("saliency", ["none", "before_lora", "after_lora"])
def test_one_step(saliency: str, monkeypatch) -> None:
    """The first step of layer-wise learning: gradients by hand, cut to their norm, and AdamW without decay of
    u and l."""
    monkeypatch.setattr(clipped, "GRADIENT_NORM", 0.05)
    options = {
        "clip_learning_rate": 0.01,
        "learning_rate": 0.02,
        "saliency": saliency,
        "saliency_weight": 0.05,
    }
    made, reference = linear(8), linear(8)
    loss, rows, quantized = linear_loss(made)
    work = learning(made, steps=2, **options)
    steps: list[dict[str, Tensor]] = []

    def watched(linears, count, *rates):
        step = descent(linears, count, *rates)

        def both() -> None:
            step()
            steps.append(made.state())

        return both

    monkeypatch.setattr(apiq, "descent", watched)
    before, _ = work._learn("w", loss)

    plain = reference.plain()
    begin = reference.state()
    reference.load(plain)
    fisher = work.fisher["w"].double() * (saliency != "none")
    weight = reference.weight.double()
    off = reference.stored().double() - weight
    expected = (rows @ weight.T - quantized @ reference.stored().double().T).square().mean()
    assert before == pytest.approx(float(expected + 0.05 * (fisher * off.square()).sum()), rel=1e-5)

    reference.load(begin)
    rounded = reference.quantized()
    A, B = reference.A.detach().double(), reference.B.detach().double()
    whole = rounded.detach().double() + 2 * B @ A
    by_whole = -2 / (len(rows) * OUT) * (rows @ weight.T - quantized @ whole.T).T @ quantized
    salient = 0.1 * fisher * ((whole if saliency == "after_lora" else rounded.detach().double()) - weight)
    by_rounded = by_whole + salient  # Q holds Ŵ, so both terms reach u and l
    if saliency == "after_lora":
        by_whole = by_whole + salient
    rounded.backward((by_rounded / before).float())
    gradients = {
        "u": reference.u.grad.double(),
        "l": reference.l.grad.double(),
        "A": 2 * B.T @ by_whole / before,
        "B": 2 * by_whole @ A.T / before,
    }
    norm = float(sum(g.square().sum() for g in gradients.values()).sqrt())
    cut = min(1.0, 0.05 / norm)
    assert cut < 1  # so that the test sees it
    for name, gradient in gradients.items():
        rate, decay = (0.01, 0.0) if name in "ul" else (0.02, ADAPTER_DECAY)
        value, gradient = begin[name].double(), cut * gradient
        moved = value * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(steps[0][name].double(), moved, atol=2e-5), name


def test_rates_fall_linearly_to_0() -> None:
    made = linear(9)
    step, values = descent([made], 4, 0.01, 0.02), [made.u.detach().clone()]
    for _ in range(4):
        made.u.grad = torch.full_like(made.u, 0.001)  # all alike, so that Adam moves by the rate
        step()
        values.append(made.u.detach().clone())
    moved = [float((a - b).mean()) for a, b in pairwise(values)]
    assert moved == pytest.approx([0.01, 0.0075, 0.005, 0.0025], rel=1e-3)


# Layers and models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    dense = hf.LlamaForCausalLM(config).eval()
    for parameter in dense.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("model")
    dense.save_pretrained(folder)
    tokens = torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[3, 8:] = False
    return dense, folder, Windows(tokens, mask, source="random")


def test_the_diagonal_fisher(model, tmp_path) -> None:
    dense, folder, windows = model
    streamed = StreamedModel(Checkpoint.open(folder))
    fisher = Fisher(streamed, windows, text_loss(windows), tmp_path)
    expected: dict[str, Tensor] = {}
    exact = hf.LlamaForCausalLM(dense.config).double()
    exact.load_state_dict(dense.state_dict())
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        exact.zero_grad()
        real = tokens[mask]  # padding is on the right, where causal attention does not look
        F.cross_entropy(exact(real[None]).logits[0, :-1], real[1:]).backward()
        for name, parameter in exact.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.square() / len(windows)
    for index in range(2):
        with streamed.layer(index) as layer:
            found = fisher.read(layer)
            assert set(found) == set(layer.linears)
        for path, values in found.items():
            wanted = expected[f"model.layers.{index}.{path}.weight"]
            assert torch.allclose(values.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


@torch.no_grad()
@pytest.mark.parametrize("aug_loss", [False, True])
def test_the_loss_of_blocks(model, aug_loss: bool, tmp_path) -> None:
    """Of plain rounding, and of what was stored, from the outputs of whole models."""
    dense, folder, windows = model
    checkpoint = Checkpoint.open(folder)
    run = StepContext(Draft(checkpoint, tmp_path), windows, 0, tmp_path, "cpu", lambda text, share: None)
    options = ApiQ.Options(
        bits=2,
        group_size=SIZE,
        rank=4,
        mode="block",
        epochs=3,
        batch_size=2,
        aug_loss=aug_loss,
        learning_rate=5e-3,
    )
    with torch.enable_grad():
        report = ApiQ().apply(StreamedModel(checkpoint), options, run)

    def states(weights: dict[str, Tensor], first: Tensor | None = None, index: int = 0) -> Tensor:
        """Hidden states behind layer ``index``, from those before it where they are given."""
        whole = hf.LlamaForCausalLM(dense.config).eval()
        whole.load_state_dict(dense.state_dict() | weights)
        seen: list[Tensor] = []
        if first is not None:
            whole.model.layers[index].register_forward_pre_hook(lambda _, args: (first, *args[1:]))
        whole.model.layers[index].register_forward_hook(lambda _, __, output: seen.append(output))
        whole(windows.tokens, attention_mask=windows.mask.long())
        return seen[0]

    def loss(weights: dict[str, Tensor], index: int, before: Tensor | None) -> float:
        output = states(weights, before, index)
        targets = [states({}, None, index)] + ([states({}, before, index)] if aug_loss else [])
        return float(sum((output - target)[windows.mask].double().square().mean() for target in targets))

    names = [name for name in dense.state_dict() if "layers" in name and name.endswith("proj.weight")]
    plain = {
        n: quantize_weight(dense.state_dict()[n], 2, SIZE, False, torch.float32).dequantize() for n in names
    }
    draft = run.draft
    formats = Formats(draft.config["quantization_config"])
    learned = {}
    for n in names:
        name = n.removesuffix(".weight")
        A, B = draft.read(f"{name}.lora_A.weight"), draft.read(f"{name}.lora_B.weight")
        learned[n] = formats.of(name).read(name, draft.read).dequantize() + 4.0 * B @ A
    before = None
    for index in (0, 1):
        here = {n: w for n, w in plain.items() if f"layers.{index}." in n}
        assert report.details["loss"]["plain_rounding"][index] == pytest.approx(
            loss(here, index, before), rel=1e-3
        )
        here = {n: w for n, w in learned.items() if f"layers.{index}." in n}
        after = loss(here, index, before)
        assert report.details["loss"]["learned"][index] == pytest.approx(after, rel=1e-3)
        assert after < 0.9 * report.details["loss"]["plain_rounding"][index]
        before = states(learned, None, index)


@pytest.mark.parametrize("mode", ["layer", "block"])
def test_rates_that_are_too_high_do_no_harm(model, mode: str, tmp_path) -> None:
    _, folder, windows = model
    checkpoint = Checkpoint.open(folder)
    run = StepContext(Draft(checkpoint, tmp_path), windows, 0, tmp_path, "cpu", lambda text, share: None)
    options = ApiQ.Options(
        bits=2, group_size=SIZE, rank=4, mode=mode, steps=5, clip_learning_rate=1e3, learning_rate=1e3
    )
    losses = ApiQ().apply(StreamedModel(checkpoint), options, run).details["loss"]
    for before, after in zip(losses["plain_rounding"], losses["learned"], strict=True):
        assert 0 < after <= before
