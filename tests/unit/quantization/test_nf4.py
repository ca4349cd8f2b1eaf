"""NF4 by bitsandbytes: stock transformers load it, and we read it without the library."""

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
from compress.kernels.codes.nf4 import NF4Weight, pack_high_first, unpack_high_first
from compress.kernels.layers.nf4_linear import NF4Linear
from compress.pipeline.plan import make_plan
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.loaders import loads_with
from compress.storage.formats.table import Formats
from compress.storage.lineage import Step

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

from compress.quantization.nf4 import NF4, quantize_nf4  # noqa: E402

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"intermediate_size": 128, "attention_bias": True}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "blocks cross rows": ("LlamaForCausalLM", {"intermediate_size": 72}),
}
Quantize = Callable[..., tuple[Path, Step]]
METHOD = NF4()


@pytest.fixture
def rounded(carry_out: Quantize) -> Quantize:
    return partial(carry_out, "nf4")


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def stock(folder: Path) -> hf.PreTrainedModel:
    """The model in transformers, without the library's kernel for CPUs with AVX-512, which rounds inputs and
    scales to bfloat16."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    for part in model.modules():
        if type(part).__name__ == "Linear4bit":
            part.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_it_is_multiplied_in_the_dtype_of_the_model(
    key: str, tiny_decoder: Callable[..., Path], rounded: Quantize
) -> None:
    """Whichever of its names config.json has for that."""
    model = tiny_decoder(dtype=torch.bfloat16)
    config = json.loads((model / "config.json").read_text())
    config[key] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    section = Checkpoint.open(rounded(model)[0]).config["quantization_config"]
    assert section["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (7, 30), (5, 3)])
def test_we_dequantize_as_the_library_does(shape: tuple[int, int], double_quant: bool) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    found = quantize_nf4(dense, torch.float32, double_quant)
    # As one row: blocks that go on from row to row are not read rightly with AVX-512 (bitsandbytes 0.50).
    packed, state = functional.quantize_4bit(
        dense.view(1, -1), quant_type="nf4", compress_statistics=double_quant
    )
    assert torch.equal(pack_high_first(found.codes), packed)
    expected = functional.dequantize_4bit(packed, state).view(shape)
    assert torch.allclose(found.dequantize(), expected, rtol=1e-6, atol=1e-9)
    rows = [2, 1, shape[0] - 3]
    parts = torch.cat([part.dequantize() for part in found.split(rows)])
    assert torch.equal(parts, found.dequantize())
    x = torch.randn(3, shape[1])
    assert torch.allclose(NF4Linear(found)(x), x @ found.dequantize().T, atol=1e-6)
    assert torch.equal(NF4Linear(found).quantized(slice(2, 4)).dequantize(), found.dequantize()[2:4])


def test_nibbles_come_back() -> None:
    codes = torch.randint(0, 16, (3, 5), dtype=torch.uint8)
    assert torch.equal(unpack_high_first(pack_high_first(codes), (3, 5)), codes)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_stock_transformers_compute_the_same(
    rounded: Quantize,
    dense: Callable[..., Path],
    name,
    dtype,
    double_quant,
) -> None:
    folder = dense(name, dtype)
    written, report = rounded(folder, double_quant=double_quant)
    ours = compress.load(written)
    assert sum(isinstance(part, NF4Linear) for part in ours.modules()) == report.details["linears"]
    theirs = stock(written)
    assert any(type(part).__name__ == "Linear4bit" for part in theirs.modules())
    expected, tolerance = logits(theirs), 1e-5 if dtype == torch.float32 else 2e-2
    assert float((logits(ours) - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_ours_is_what_transformers_saves(
    rounded: Quantize, dense: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dense("llama")
    written, _ = rounded(folder)
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = Checkpoint.open(written), Checkpoint.open(tmp_path / "theirs")
    assert ours.tensors == theirs.tensors
    for name in ours.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name
    assert torch.equal(logits(compress.load(tmp_path / "theirs")), logits(compress.load(written)))


def test_conv1d(rounded: Quantize, dense: Callable[..., Path]) -> None:
    folder = dense("gpt2", torch.float32)
    written, _ = rounded(folder, ignore=["*0.mlp.c_fc"])
    model = compress.load(written)
    reference = hf.AutoModelForCausalLM.from_pretrained(folder)
    for path, part in model.named_modules():
        if isinstance(part, NF4Linear):
            reference.get_submodule(path).weight.data = part.quantized().dequantize().T.contiguous()
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", "transformer.h.0.mlp.c_fc"]
    assert loads_with(config, conv1d=True) == loads_with(config)
    assert str(loads_with(config)) == "transformers with bitsandbytes"
    theirs = stock(written)
    assert sum(type(part).__name__ == "Linear4bit" for part in theirs.modules()) == 7
    assert torch.allclose(logits(model), logits(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "where"), [("llama", ""), ("blocks cross rows", " (not on CPUs with AVX-512)")]
)
def test_who_loads_it(rounded: Quantize, dense: Callable[..., Path], name: str, where: str) -> None:
    written, _ = rounded(dense(name))
    assert str(ModelShape.of(Checkpoint.open(written)).loads_with) == f"transformers with bitsandbytes{where}"


def test_what_cannot_be_done_is_said(
    rounded: Quantize,
    dense: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, _ = rounded(dense("llama"))
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    for change in (
        {"load_in_4bit": False},
        {"bnb_4bit_quant_type": "fp3"},
        {"bnb_4bit_quant_storage": "bfloat16"},
    ):
        with pytest.raises(BadInput, match="can be read"):
            Formats({**config, **change})
    form = Formats(config).of("x")
    checkpoint = Checkpoint.open(written)
    name = "model.layers.0.mlp.up_proj"
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors if key.startswith(name)}
    assert isinstance(form.read(name, tensors.__getitem__), NF4Weight)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1]
    with pytest.raises(BadInput, match="shape"):
        form.read(name, tensors.__getitem__)
    monkeypatch.setattr("compress.pipeline.plan.find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"nf4 needs bitsandbytes: pip install 'compress-model\[bits"):
        make_plan(Checkpoint.open(dense("llama")), [(METHOD, METHOD.Options())])
