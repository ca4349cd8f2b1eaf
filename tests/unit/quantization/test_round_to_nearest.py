"""Round-to-nearest through the engine on tiny models: what is planned is what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import compress
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.kernels.codes.packing import BITS
from compress.method import StepContext
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.table import format_of
from compress.storage.lineage import Step

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {}),
}
STOCK = [name for name in CASES if name != "gpt2"]  # transformers replaces nn.Linear, not Conv1D
Quantize = Callable[..., tuple[Path, Step]]
METHOD = RoundToNearest()


@pytest.fixture
def quantized(carry_out: Quantize) -> Quantize:
    return partial(carry_out, "rtn")


def dequantized(folder: Path, written: Path) -> torch.nn.Module:
    """The dense model with every weight replaced by what its codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = Checkpoint.open(written)
    form = format_of(checkpoint.config["quantization_config"])
    names = [
        name.removesuffix(f".{form.marker}") for name in checkpoint.tensors if name.endswith(form.marker)
    ]
    assert names
    for name in names:
        value = form.read(name, checkpoint.read).dequantize()
        linear = model.get_submodule(name)
        transposed = type(linear).__name__ == "Conv1D"
        linear.weight.data = (value.t() if transposed else value).to(linear.weight.dtype).contiguous()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


GRIDS = [(32, True), (32, False), ("channel", True)]


# Every grid in every architecture, with 4 to 8 bits in turns.
@pytest.mark.parametrize(
    ("name", "bits", "group_size", "symmetric"),
    [
        (name, (4, 5, 6, 7, 8)[(row + column) % 5], *grid)
        for row, name in enumerate(STOCK)
        for column, grid in enumerate(GRIDS)
    ],
)
def test_stock_transformers_load_it_with_the_same_logits(
    quantized: Quantize, name, bits, group_size, symmetric, dense
):
    folder = dense(name)
    written, _ = quantized(folder, bits=bits, group_size=group_size, symmetric=symmetric)
    stock = AutoModelForCausalLM.from_pretrained(written)
    assert torch.equal(logits(stock), logits(dequantized(folder, written)))


# Every format in every architecture, symmetric and not, with a number of bits that goes around: each format
# meets each grid, and formats know nothing of architectures but which of their linears are transposed.
@pytest.mark.parametrize(
    ("name", "form", "bits", "symmetric"),
    [
        (name, form.name, form.widths[row % len(form.widths)], symmetric)
        for row, name in enumerate(CASES)
        for form in (CompressedTensorsFormat, GPTQFormat)
        for symmetric in (True, False)
    ],
)
def test_we_load_it_packed_with_the_same_logits(quantized: Quantize, name, form, bits, symmetric, dense):
    folder = dense(name, torch.float32)
    written, report = quantized(folder, bits=bits, group_size=32, symmetric=symmetric, format=form)
    packed = compress.load(written)
    linears = [part for part in packed.modules() if type(part).__name__ == "PackedLinear"]
    assert len(linears) == report.details["linears"] > 0
    expected = logits(dequantized(folder, written))
    assert float((logits(packed) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_parts_can_be_kept(quantized: Quantize, dense):
    folder = dense("llama")
    kept = ["model.layers.0.mlp.up_proj", "*.v_proj", "re:.*layers\\.1\\.self_attn\\.q", "lm_head"]
    written, report = quantized(folder, group_size=32, ignore=kept)
    assert report.details["kept"] == [
        "lm_head",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    before, after = Checkpoint.open(folder), Checkpoint.open(written)
    for name in report.details["kept"]:
        assert torch.equal(before.read(f"{name}.weight"), after.read(f"{name}.weight"))
    assert report.details["linears"] == 14 - 4
    stock = AutoModelForCausalLM.from_pretrained(written)
    assert torch.equal(logits(stock), logits(dequantized(folder, written)))


def test_gptq_names_what_it_keeps_for_both_of_its_loaders(quantized: Quantize, dense):
    folder = dense("llama")
    written, _ = quantized(folder, bits=3, group_size=32, ignore=["*.down_proj"], format="gptq")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [
        "-:^model\\.layers\\.0\\.mlp\\.down_proj$",
        "-:^model\\.layers\\.1\\.mlp\\.down_proj$",
    ]
    assert len(config["modules_in_block_to_quantize"][0]) == 12
    assert config["quant_method"] == "gptq"


def test_linears_around_the_layers_are_kept(quantized: Quantize, dense):
    folder = dense("opt")
    _, report = quantized(folder, group_size=32)
    assert set(report.details["kept"]) == {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}


def test_the_report_tells_bits_and_errors(quantized: Quantize, dense):
    folder = dense("llama")
    errors = []
    for bits in BITS:
        _, report = quantized(folder, bits=bits, group_size=32, format="compressed-tensors")
        error = report.details["relative_error"]
        assert 0 < error["mean"] <= error["max"] < 1
        assert error["worst_linear"] in report.summary or error["worst_linear"].startswith("model.layers.")
        grid = (16 + bits) / 32  # a scale and a zero point for each group; weight_shape comes on top
        assert bits + grid <= report.details["bits_per_weight"] < bits + grid + 0.06
        errors.append(error["mean"])
    assert errors == sorted(errors, reverse=True)


def test_a_resumed_run_reports_and_writes_the_same(dense, tmp_path):
    folder = dense("llama")
    options = METHOD.Options(group_size=32)
    checkpoint = Checkpoint.open(folder)

    def run(work: Path) -> StepContext:
        return StepContext(Draft(checkpoint, work), None, 0, work, "cpu", lambda text, share: None)

    class Killed(Exception):
        pass

    def kill(text: str, share: float) -> None:
        if share:
            raise Killed

    unbroken = run(tmp_path / "a")
    expected = METHOD.apply(StreamedModel(checkpoint), options, unbroken)
    with pytest.raises(Killed):  # after the first layer
        METHOD.apply(StreamedModel(checkpoint, progress=kill), options, run(tmp_path / "b"))
    resumed = run(tmp_path / "b")
    seen: list[float] = []
    report = METHOD.apply(
        StreamedModel(checkpoint, progress=lambda text, share: seen.append(share)), options, resumed
    )
    assert seen == [0.5, 1.0]
    assert report == expected
    assert resumed.draft.tensors == unbroken.draft.tensors
    for name in unbroken.draft.tensors:
        assert torch.equal(unbroken.draft.read(name), resumed.draft.read(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 128},
            r"128 does not divide the input dimension 64 of 'model\.layers\.0\..*'; use 8, 16, 32 or",
        ),
        ({"group_size": 32, "ignore": ["*"]}, "no linear to quantize"),
        (
            {"group_size": 32, "ignore": ["model.layer.*"]},
            r"'model\.layer\.\*' in 'ignore' matches no linear",
        ),
        ({"group_size": 32, "ignore": ["re:("]}, "not a regular expression"),
    ],
)
def test_bad_options_are_refused_when_planning(options, message, dense):
    shape = ModelShape.of(Checkpoint.open(dense("llama")))
    with pytest.raises(BadInput, match=message):
        METHOD.plan(shape, METHOD.Options(**options))


def test_a_quantized_model_is_refused(quantized: Quantize, dense):
    written, _ = quantized(dense("llama"), group_size=32)
    with pytest.raises(BadInput, match=r"already quantized \(compressed-tensors\)"):
        METHOD.plan(ModelShape.of(Checkpoint.open(written)), METHOD.Options(group_size=32))


@pytest.mark.parametrize(
    "options",
    [{"bits": 9}, {"bits": 5, "format": "gptq"}, {"group_size": 0}, {"group_size": "row"}, {"grupo": 1}],
)
def test_options_that_do_not_exist(options):
    with pytest.raises(ValidationError):
        METHOD.Options(**options)


def test_who_can_load_a_plan(dense):
    def said(name: str, **options) -> str:
        shape = ModelShape.of(Checkpoint.open(dense(name)))
        return str(METHOD.plan(shape, METHOD.Options(group_size=32, **options)).loads_with)

    assert said("llama") == "transformers with compressed-tensors"
    assert said("gpt2") == "compress-model only"
    assert said("gpt2", bits=3, format="gptq") == "gptqmodel"
