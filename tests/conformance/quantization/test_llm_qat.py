"""LLM-QAT against its equations in float64: quantizers, gradient, forward pass, loss, a training step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import compress
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.kernels.codes.minmax import fake_quantize, quantize, quantize_channels
from compress.method import StepContext
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization.llm_qat import LLMQAT, FakeQuantizedModel, weight_options
from compress.quantization.parts.distillation import Teacher, distil, divergence, teacher_hidden_states
from compress.quantization.parts.packer import Packer
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft


def restated(values: Tensor, bits: int) -> Tensor:
    """x̂ = s · round(x / s) with s = (max|x| + 1e-6) / (2^(b−1) − 1) over the last axis, in float64."""
    step = (values.double().abs().amax(-1, keepdim=True) + 1e-6) / (2 ** (bits - 1) - 1)
    return step * torch.round(values.double() / step)


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.integers(0, 10**6),
    st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
)
def test_quantizer(rows: int, width: int, bits: int, seed: int, spread: float) -> None:
    values = random(rows, width, seed=seed, spread=spread)
    codes, scales = quantize(values, bits)
    top = 2 ** (bits - 1) - 1
    expected = restated(values, bits)

    assert scales.shape == (rows, 1)
    assert torch.equal(codes, codes.round())
    assert int(codes.abs().max()) <= top  # the lowest code of two's complement is never used
    # Float32 and float64 may fall on different sides of a tie.
    near_tie = ((values.double() / scales.double()) % 1 - 0.5).abs() < 1e-4
    assert torch.allclose((codes * scales).double()[~near_tie], expected[~near_tie], rtol=1e-5, atol=1e-12)
    assert torch.equal(fake_quantize(values, bits), codes * scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scales_are_those_the_codes_are_nearest_to(dtype: torch.dtype) -> None:
    weight = random(6, 50)
    weight[2] = 0
    for bits in (3, 4, 8):
        stored = quantize_channels(weight, bits, dtype)
        assert stored.scales.dtype == dtype
        assert torch.equal(stored.dequantize(), fake_quantize(weight, bits, dtype))
        step = stored.scales.float()
        inside = weight.abs() <= step * (2 ** (bits - 1) - 1)
        assert ((stored.dequantize() - weight).abs() <= 0.5001 * step)[inside].all()
        assert (stored.dequantize()[2] == 0).all()


def test_gradient_passes_straight_through() -> None:
    values = random(4, 9, spread=2).requires_grad_()
    upstream = random(4, 9, seed=1)
    (plain,) = torch.autograd.grad(fake_quantize(values, 4), values, upstream)
    (cut,) = torch.autograd.grad(fake_quantize(values, 4, cut=2.0), values, upstream)

    assert torch.equal(plain, upstream)
    assert 0 < (values.abs() >= 2).sum() < values.numel()
    assert torch.equal(cut, torch.where(values.abs() >= 2, 0, upstream))
    exact = torch.tensor([2.0, -2.0, 1.999]).requires_grad_()
    (at,) = torch.autograd.grad(fake_quantize(exact, 4, cut=2.0).sum(), exact)
    assert at.tolist() == [0, 0, 1]


def restated_logits(folder: Path, options: LLMQAT.Options, tokens: Tensor) -> Tensor:
    """A Llama written out in float64, with the quantizers where LLM-QAT has them: [B, S, V]."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    batch, length = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weights[name]

    def linear(x: Tensor, name: str) -> Tensor:
        if options.activation_bits < 16:
            x = restated(x, options.activation_bits)
        return x @ restated(weights[f"{name}.weight"], options.bits).T

    def rope(x: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def key_values(x: Tensor) -> Tensor:
        """[B, heads, S, width], quantized."""
        if options.kv_bits == 16:
            return x
        if options.kv_scale == "head":
            return restated(x, options.kv_bits)
        whole = restated(x.transpose(1, 2).flatten(-2), options.kv_bits)
        return whole.view(batch, length, kv_heads, width).transpose(1, 2)

    hidden = weights["model.embed_tokens.weight"][tokens]
    causal = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        x = norm(hidden, f"{name}.input_layernorm.weight")
        query, key, value = (
            linear(x, f"{name}.self_attn.{part}_proj").view(batch, length, -1, width).transpose(1, 2)
            for part in "qkv"
        )
        before = options.kv_position == "before-rope"
        key = rope(key_values(key)) if before else key_values(rope(key))
        value = key_values(value)
        key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
        scores = (rope(query) @ key.transpose(-1, -2) / math.sqrt(width) + causal).softmax(-1)
        attended = (scores @ value).transpose(1, 2).flatten(-2)
        hidden = hidden + linear(attended, f"{name}.self_attn.o_proj")
        x = norm(hidden, f"{name}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(x, f"{name}.mlp.gate_proj"))
        hidden = hidden + linear(gate * linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    return norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T


TOKENS = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(3))


def start(
    folder: Path, options: LLMQAT.Options, windows: Windows, scratch: Path
) -> tuple[FakeQuantizedModel, StepContext]:
    checkpoint = Checkpoint.open(folder)
    run = StepContext(
        Draft(checkpoint, scratch / "draft"), windows, 0, scratch / "run", "cpu", lambda *_: None
    )
    packer = Packer(run.draft, weight_options(options), {})
    return FakeQuantizedModel(StreamedModel(checkpoint), packer, options, run), run


def windows_of(tokens: Tensor, real: list[int] | None = None) -> Windows:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, count in enumerate(real or []):
        mask[row, count:] = False
    return Windows(tokens, mask, "test")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kv_scale": "head", "kv_position": "after-rope", "kv_bits": 8},
        {"kv_position": "after-rope"},
        {"kv_scale": "head", "bits": 8},
        {"activation_bits": 16, "kv_bits": 16, "bits": 3},
    ],
)
def test_forward_pass_and_what_is_loaded(
    tiny_decoder: Callable[..., Path], tmp_path: Path, given: dict[str, object]
) -> None:
    dense = tiny_decoder()
    options = LLMQAT.Options(steps=0, **given)
    expected = restated_logits(dense, options, TOKENS)
    student, _ = start(dense, options, windows_of(TOKENS), tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("What is quantized here are the weights, and what they are given. " * 9)
    step = {"method": "llm-qat", **options.model_dump()}
    calibration = {"source": str(text), "nsamples": 2, "seqlen": 16}
    execute(parse_recipe({"model": str(dense), "calibration": calibration, "steps": [step]}), tmp_path / "q")

    with torch.no_grad():
        trained = student.model(TOKENS, use_cache=False).logits
        loaded = compress.load(tmp_path / "q")(TOKENS).logits
        plain = compress.load(dense)(TOKENS).logits
    assert (trained - expected).abs().max() < 1e-4
    assert (loaded - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2


@torch.no_grad()
def restated_loss(student: FakeQuantizedModel, dense: Path, windows: Windows) -> float:
    """The mean over real tokens of KL(teacher ‖ student), from the logits of both in float64."""
    model = compress.load(dense)
    terms = []
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        real = tokens[mask][None]
        teacher = model(real).logits[0].double().softmax(-1)
        answer = student.model(real, use_cache=False).logits[0].double().softmax(-1)
        terms += (teacher * (teacher / answer).log()).sum(-1).tolist()
    return math.fsum(terms) / len(terms)


def test_loss_is_a_mean_over_real_tokens(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense = tiny_decoder()
    windows = windows_of(TOKENS, [12, 5])
    model = StreamedModel(Checkpoint.open(dense))
    student, run = start(dense, LLMQAT.Options(), windows, tmp_path)
    hidden = teacher_hidden_states(model, run)
    with model.head() as head:
        teacher = Teacher(head, hidden)
        loss = divergence(student, teacher, windows, torch.tensor([0, 1]))
        alone = [divergence(student, teacher, windows, torch.tensor([row])) for row in (0, 1)]

    assert loss.item() == pytest.approx(restated_loss(student, dense, windows), rel=1e-4)
    assert loss.item() == pytest.approx((12 * alone[0] + 5 * alone[1]).item() / 17, rel=1e-5)
    assert alone[0].item() != pytest.approx(alone[1].item(), rel=1e-2)


def test_a_step_is_adamw_on_the_clipped_gradient(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense = tiny_decoder()
    windows = windows_of(TOKENS)
    options = LLMQAT.Options(steps=2, batch_size=2, learning_rate=1e-3, max_gradient_norm=0.05)
    model = StreamedModel(Checkpoint.open(dense))
    student, run = start(dense, options, windows, tmp_path)
    other, _ = start(dense, options, windows, tmp_path / "other")
    weights = {name: value.detach().double().clone() for name, value in other.model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    hidden = teacher_hidden_states(model, run)
    with model.head() as head:
        teacher = Teacher(head, hidden)
        for step in (0, 1):
            rows = torch.tensor([0, 1])
            divergence(other, teacher, windows, rows).backward()
            gradients = {name: value.grad.double() for name, value in other.model.named_parameters()}
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
            assert norm > options.max_gradient_norm
            rate = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / 2))
            for name, value in other.model.named_parameters():
                gradient = gradients[name] * (options.max_gradient_norm / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient.square()
                mean = first[name] / (1 - 0.9 ** (step + 1))
                square = second[name] / (1 - 0.999 ** (step + 1))
                weights[name] -= rate * mean / (square.sqrt() + 1e-8)
                value.data, value.grad = weights[name].float(), None
        distil(student, teacher, windows, 2, options, run)

    before = compress.load(dense).get_submodule("model.layers.0.mlp.up_proj").weight
    moved = 0
    for name, value in student.model.named_parameters():
        # Adam divides by the size of a gradient, so where that is all but 0 its rounding counts.
        wrong = (value.detach().double() - weights[name]).abs() > 2e-5
        assert wrong.double().mean() < 0.02, name
        moved += value.numel()
    up = student.model.get_submodule("model.layers.0.mlp.up_proj").parametrizations.weight.original
    assert (up - before).abs().max() > 1e-3
    assert moved == sum(value.numel() for value in student.trained())
