"""LLM.int8() by bitsandbytes: what transformers itself saves, and the same products without the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import compress
from compress.cli import cli
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.int8 import Int8Weight
from compress.kernels.layers import int8_linear
from compress.kernels.layers.int8_linear import Int8Linear, quantize_inputs
from compress.kernels.reference import ops as reference
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.loaders import loads_with
from compress.storage.formats.table import Formats

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

from compress.quantization.llm_int8 import LLMInt8, quantize_int8  # noqa: E402

THEIR_SCALE = 6.200124e-05
"""What bitsandbytes 0.50 takes for 1 / 127^2 on a CPU."""
BFLOAT16 = {"dtype": torch.bfloat16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, **BFLOAT16}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **BFLOAT16}),
}


def rounded(dense: Path, output: Path, **options: Any) -> Path:
    execute(parse_recipe({"model": str(dense), "steps": [{"method": "llm-int8", **options}]}), output)
    return output


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 25, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits.float()


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def inputs(tokens: int, width: int, *outliers: int) -> torch.Tensor:
    """Random tokens below 4, with one value of 20 or more in each column of ``outliers``."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    for number, column in enumerate(outliers):
        x[number % tokens, column] = (-1) ** number * (20 + number)
    return x


def restated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, list[int]]:
    """Section 3 of the paper in float64, one number at a time, and the columns of outliers."""
    half = x.to(torch.float16).double().tolist()
    rows = weight.to(torch.float16).double().tolist()
    outliers = [
        column
        for column in range(x.shape[1])
        if threshold and any(abs(token[column]) >= threshold for token in half)
    ]
    result = torch.zeros(len(half), len(rows), dtype=torch.float64)
    for t, token in enumerate(half):
        r = max((abs(value) for value in token if not threshold or abs(value) < threshold), default=0)
        for i, row in enumerate(rows):
            c = max(map(abs, row))
            total = float(bias[i])
            for j, value in enumerate(token):
                code = round(127 * row[j] / c) if c else 0
                if j in outliers:
                    total += float(x[t, j]) * code * c / 127
                elif r:
                    total += round(127 * value / r) * code * r * c / 127**2
            result[t, i] = total
    return result, outliers


@pytest.mark.parametrize(("tokens", "out", "width"), [(5, 7, 30), (1, 4, 16), (3, 1, 1)])
@pytest.mark.parametrize("threshold", [6.0, 1.0, 0.0])
def test_products_are_those_of_the_paper(tokens: int, out: int, width: int, threshold: float) -> None:
    x = inputs(tokens, width, *{0, width // 3, width - 1})
    weight, bias = torch.randn(out, width), torch.randn(out)
    found = Int8Linear(quantize_int8(weight, threshold, "x"), bias)(x)
    expected, outliers = restated(x, weight, bias, threshold)
    assert bool(outliers) == bool(threshold)
    assert quantize_inputs(x, threshold)[2].tolist() == outliers
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_library(dtype: torch.dtype, threshold: float, monkeypatch) -> None:
    from bitsandbytes import MatmulLtState, matmul

    monkeypatch.setattr(int8_linear, "SCALE", THEIR_SCALE)
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 200)  # a few rows at once
    x, bias = inputs(6, 48, 3, 17).to(dtype), torch.randn(40).to(dtype)
    weight = quantize_int8(torch.randn(40, 48), threshold, "x")
    state = MatmulLtState(CB=weight.codes, SCB=weight.absmax)
    state.threshold = threshold
    state.has_fp16_weights = state.is_training = False
    expected = matmul(x, weight.codes, bias=bias, state=state)
    found = Int8Linear(weight, bias)(x)
    assert found.dtype == expected.dtype == dtype
    # The last digit may differ.
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_outliers_do_not_cost_other_inputs_their_digits() -> None:
    x, weight = inputs(16, 64, 5, 40), torch.randn(32, 64)
    x[:, 5] *= 30
    others = x.clone()
    others[:, [5, 40]] = 0
    errors = []
    for threshold in (0.0, 6.0):
        layer = Int8Linear(quantize_int8(weight, threshold, "x"))
        exact = layer.quantized().dequantize().double().T
        errors.append(float((layer(x) - x.double() @ exact).norm() / (others.double() @ exact).norm()))
    assert 10 * errors[1] < errors[0]
    assert errors[1] < 0.01


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_zeros_stay_zeros(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 8)
    weight[2] = 0
    codes, absmax, rest = functional.int8_vectorwise_quant(weight.to(torch.float16))
    # 0 / 0 as a whole number differs from processor to processor.
    codes[2] = -128
    monkeypatch.setattr(functional, "int8_vectorwise_quant", lambda _: (codes.clone(), absmax, rest))
    found = quantize_int8(weight, threshold, "x")
    kept = [0, 1, 3]
    assert torch.equal(found.codes[kept], codes[kept])
    assert torch.equal(found.absmax, absmax)
    assert not found.codes[2].any()
    assert torch.equal(found.dequantize()[2], torch.zeros(8))
    x, bias = torch.randn(3, 8), torch.randn(4)
    x[1] = 0
    result = Int8Linear(found, bias)(x)
    assert torch.equal(result[:, 2], bias[2].expand(3))
    assert torch.equal(result[1], bias)


def test_parts_are_the_whole() -> None:
    found = quantize_int8(torch.randn(6, 9), 6.0, "x")
    parts = found.split([2, 1, 3])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), found.dequantize())
    layer = Int8Linear(found).to(torch.bfloat16)  # which leaves float32 maxima alone
    assert layer.quantized().same_as(found)
    assert layer.quantized(slice(2, 3)).same_as(parts[1])
    assert not found.same_as(Int8Weight(found.codes, found.absmax, 0.0))
    assert layer.weight_bytes == 6 * 9 + 6 * 4


@pytest.mark.parametrize("case", CASES)
def test_ours_is_what_transformers_saves(
    case: str, shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shared_decoder(CASES[case][0], **CASES[case][1])
    written = rounded(dense, tmp_path / "ours")
    settings = hf.BitsAndBytesConfig(load_in_8bit=True)
    theirs = tmp_path / "theirs"
    stock = hf.AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings)
    stock.save_pretrained(theirs)
    ours_read, theirs_read = Checkpoint.open(written), Checkpoint.open(theirs)
    assert ours_read.tensors == theirs_read.tensors
    for name in ours_read.tensors:
        assert torch.equal(ours_read.read(name), theirs_read.read(name)), name
    ours_config, theirs_config = quantization_config(written), quantization_config(theirs)
    assert ours_config.pop("llm_int8_skip_modules") == ["lm_head"]
    assert ours_config.items() <= theirs_config.items()

    # Stock transformers read ours, and compute what we do, but for their 1 / 127^2.
    again = hf.AutoModelForCausalLM.from_pretrained(written)
    linears = [path for path, part in again.named_modules() if type(part).__name__ == "Linear8bitLt"]
    ours = compress.load(written)
    assert linears == [path for path, part in ours.named_modules() if isinstance(part, Int8Linear)]
    assert len(linears) == (8 if case == "gpt2" else 14)
    expected = logits(again)
    assert torch.equal(expected, logits(stock))
    assert float((logits(ours) - expected).abs().max()) <= 0.04 * float(expected.abs().max())
    monkeypatch.setattr(int8_linear, "SCALE", THEIR_SCALE)
    tolerance = 1e-5 if case == "llama" else 1e-2
    assert float((logits(ours) - expected).abs().max()) <= tolerance * float(expected.abs().max())

    # And we read theirs.
    assert torch.equal(logits(compress.load(theirs)), logits(ours))
    assert str(ModelShape.of(theirs_read).loads_with) == "transformers with bitsandbytes"


def test_options_reach_the_file(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    written = rounded(tiny_decoder(), tmp_path / "out", threshold=0, ignore=["*0.mlp.up_proj", "re:.*o_proj"])
    config = quantization_config(written)
    assert config["llm_int8_threshold"] == 0
    assert config["llm_int8_skip_modules"] == [
        "lm_head",
        *("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
    ]
    model = compress.load(written)
    packed = {path: part for path, part in model.named_modules() if isinstance(part, Int8Linear)}
    assert len(packed) == 11
    assert {part.threshold for part in packed.values()} == {0}
    stock = hf.AutoModelForCausalLM.from_pretrained(written)
    theirs = {path: part for path, part in stock.named_modules() if type(part).__name__ == "Linear8bitLt"}
    assert theirs.keys() == packed.keys()
    assert {part.state.threshold for part in theirs.values()} == {0}
    record = json.loads((written / "compression.json").read_text())
    assert record["steps"][0]["details"]["linears"] == 11


def test_encoders(tiny_encoder: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(int8_linear, "SCALE", THEIR_SCALE)
    written = rounded(tiny_encoder("BertForMaskedLM"), tmp_path / "out", threshold=2.0)
    ours, stock = compress.load(written), hf.AutoModelForMaskedLM.from_pretrained(written)
    assert sum(isinstance(part, Int8Linear) for part in ours.modules()) == 12
    assert sum(type(part).__name__ == "Linear8bitLt" for part in stock.modules()) == 12
    expected = logits(stock)
    # Sums whose last digit differs are rounded to another number here and there.
    assert float((logits(ours) - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


def test_commands(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense, output = tiny_decoder(), tmp_path / "out"
    words = ["quantize", str(dense), "--method", "llm-int8", "-o", str(output)]
    planned = CliRunner().invoke(cli, [*words, "--dry-run"], catch_exceptions=False)
    assert planned.exit_code == 0
    assert "transformers with bitsandbytes" in " ".join(planned.output.split())
    assert not output.exists()
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(output), "--json"]).stdout)
    assert found["loads_with"] == "transformers with bitsandbytes"
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    rows = 2 * (64 + 32 + 32 + 64 + 2 * 96 + 64)
    assert found["dtypes"]["I8"] == weights
    assert found["dtypes"]["U8"] == 14
    assert found["dtypes"]["F32"] == 4 * (rows + 2 * 257 * 64 + 5 * 64)
    assert set(found["bytes_per_part"]) == {"embeddings", "attention", "mlp", "norms", "head"}
    assert found["bytes_per_part"]["mlp"] == 2 * (3 * 64 * 96 + 4 * (2 * 96 + 64) + 3)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(float("nan"), "NaN or infinite"), (7e4, "too large for float16.*use the method rtn")],
)
def test_weights_that_cannot_be_rounded(
    value: float, sentence: str, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense, name = tiny_decoder(), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(dense / "model.safetensors")
    tensors[name][3, 4] = value
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"'{name}' .*{sentence}"):
        rounded(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_said(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    written = rounded(tiny_decoder(), tmp_path / "out")
    config = quantization_config(written)
    with pytest.raises(BadInput, match="only if their weights are int8"):
        Formats(config | {"llm_int8_has_fp16_weight": True})
    name, checkpoint = "model.layers.0.mlp.up_proj", Checkpoint.open(written)
    good = {key: checkpoint.read(key) for key in checkpoint.tensors if key.startswith(name)}
    form = Formats(config).of(name)
    assert form.read(name, good.__getitem__).shape == (96, 64)
    for key, change, sentence in (
        ("weight", good[f"{name}.weight"].float(), "int8 .* was expected"),
        ("SCB", good[f"{name}.SCB"][:-1], "has shape"),
        ("weight_format", torch.tensor(1, dtype=torch.uint8), "one kind of GPU"),
    ):
        bad = good | {f"{name}.{key}": change}
        with pytest.raises(BadInput, match=sentence):
            form.read(name, bad.__getitem__)


def test_what_cannot_be_made_is_said(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    dense, method = shared_decoder(), LLMInt8()
    with pytest.raises(BadInput, match="threshold"):
        parse_recipe({"model": str(dense), "steps": [{"method": "llm-int8", "threshold": -1}]})
    shape = ModelShape.of(Checkpoint.open(dense))
    with pytest.raises(BadInput, match="already quantized"):
        method.plan(method.plan(shape, method.Options()), method.Options())
    monkeypatch.setattr("compress.pipeline.plan.find_spec", lambda _: None)
    with pytest.raises(BadInput, match="llm-int8 needs bitsandbytes"):
        make_plan(Checkpoint.open(dense), [(method, method.Options())])


def test_who_loads_it() -> None:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert Formats(config).of("x").threshold == 6
    assert loads_with(config, conv1d=True) == loads_with(config)
    assert str(loads_with(config)) == "transformers with bitsandbytes"
