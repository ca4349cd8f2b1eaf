"""FP8, MXFP4 and NVFP4 through the engine: what is planned is written, and stock transformers load it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compress
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.quantization.round_to_float import RoundToFloat
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.loaders import loads_with
from compress.storage.formats.table import Formats
from compress.storage.lineage import Step

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
}
TYPES = ["fp8", "mxfp4", "nvfp4"]
Quantize = Callable[..., tuple[Path, Step]]
METHOD = RoundToFloat()


@pytest.fixture
def rounded(carry_out: Quantize) -> Quantize:
    return partial(carry_out, "float")


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_stock_transformers_compute_the_same(
    rounded: Quantize,
    dense: Callable[..., Path],
    name: str,
    type: str,
    dtype: torch.dtype,
) -> None:
    folder = dense(name, dtype)
    written, _ = rounded(folder, type=type)
    # In plain torch, as stock transformers compute: a native kernel sums in another order, which moves codes
    # of bfloat16 inputs, and more so on processors without AVX-512.
    ours = logits(compress.load(written, kernel="reference"))
    stock = logits(hf.AutoModelForCausalLM.from_pretrained(written))
    # compressed-tensors makes bfloat16 of NVFP4 whatever the dtype of the model.
    exact = dtype == torch.bfloat16 or type != "nvfp4"
    tolerance = 1e-5 if exact and dtype == torch.float32 else 1e-2
    assert float((ours - stock).abs().max()) <= tolerance * float(stock.abs().max())
    without = logits(hf.AutoModelForCausalLM.from_pretrained(folder))
    assert float((stock - without).abs().max()) > 2e-2 * float(stock.abs().max())


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_we_load_it_packed(
    rounded: Quantize,
    dense: Callable[..., Path],
    name: str,
    type: str,
    kernel: str,
) -> None:
    folder = dense(name, torch.float32)
    written, report = rounded(folder, type=type)
    model = compress.load(written, kernel=kernel)
    linears = {n: part for n, part in model.named_modules() if part.__class__.__name__ == "FloatLinear"}
    assert len(linears) == report.details["linears"] > 0
    bits = sum(p.weight_bytes for p in linears.values()) * 8
    bits /= sum(p.out_features * p.in_features for p in linears.values())
    # Native kernels take scales of 16 bits, which may be stored in 8; and tiny rows are filled up.
    room = 1e-3 if kernel == "reference" else 0.3
    assert bits == pytest.approx(report.details["bits_per_weight"], rel=room)
    reference = hf.AutoModelForCausalLM.from_pretrained(folder)
    for path, part in linears.items():
        linear = reference.get_submodule(path)
        value = part.quantized().dequantize()
        linear.weight.data = value.T.contiguous() if name == "gpt2" else value
        if type == "fp8":  # of the inputs, too
            linear.register_forward_pre_hook(lambda _, inputs: in_fp8(*inputs))
    expected = logits(reference)
    assert float((logits(model) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    part = next(iter(linears.values()))
    before = part.quantized()
    assert part.to(torch.bfloat16).quantized().same_as(before)  # which no cast may change


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def test_fused_linears_share_the_global_scale(rounded: Quantize, dense: Callable[..., Path]) -> None:
    written, _ = rounded(dense("llama"), type="nvfp4")
    checkpoint = Checkpoint.open(written)

    def whole(path: str) -> float:
        return checkpoint.read(f"model.layers.1.{path}.weight_global_scale").item()

    assert whole("self_attn.q_proj") == whole("self_attn.k_proj") == whole("self_attn.v_proj")
    assert whole("mlp.gate_proj") == whole("mlp.up_proj") != whole("mlp.down_proj")


def test_parts_can_be_kept_and_bad_input_is_refused(rounded: Quantize, dense: Callable[..., Path]) -> None:
    folder = dense("llama")
    written, report = rounded(folder, type="mxfp4", ignore=["*.down_proj"])
    assert report.details["kept"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]
    logits(hf.AutoModelForCausalLM.from_pretrained(written))
    with pytest.raises(BadInput, match="already quantized"):
        METHOD.plan(ModelShape.of(Checkpoint.open(written)), METHOD.Options())


def test_what_is_declared_is_read_and_other_schemes_are_refused(
    rounded: Quantize, dense: Callable[..., Path]
) -> None:
    written, _ = rounded(dense("llama"), type="fp8")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert Formats(config).bits == [8]
    assert str(loads_with(config)) == "transformers with compressed-tensors"
    assert str(loads_with(config, conv1d=True)) == "compress-model only"
    group = config["config_groups"]["group_0"]
    weights = {**group["weights"], "strategy": "block"}
    for changed in ({**group, "weights": weights}, {**group, "input_activations": None}):
        with pytest.raises(BadInput, match="can be read"):
            Formats({**config, "config_groups": {"group_0": changed}})
