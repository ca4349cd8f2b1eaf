"""LLM-QAT through the command line's way: trained, packed, loaded by us and by stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compress
from compress.engine.key_values import KEY
from compress.engine.logits import streamed_logits
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.kernels.cpu.library import REFERENCE, kernel_name
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization import llm_qat
from compress.quantization.parts import distillation
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.table import format_of
from compress.storage.lineage import Lineage

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 16},  # caps its logits
    "GPT2LMHeadModel": {},
}


def quantized(dense: Path, output: Path, dtype: str | None = None, **options: Any) -> Lineage:
    calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 24}
    step = {"method": "llm-qat", "batch_size": 4, "learning_rate": 1e-3, **options}
    recipe = {"model": str(dense), "dtype": dtype, "calibration": calibration, "steps": [step]}
    return execute(parse_recipe(recipe), output, overwrite=True)


def tokens_of(dense: Path) -> torch.Tensor:
    text = (dense.parent / "text.txt").read_text()[:48]
    return hf.AutoTokenizer.from_pretrained(dense)(text, return_tensors="pt").input_ids


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[llm_qat.FakeQuantizedModel]:
    """The students of the runs of a test."""
    kept: list[llm_qat.FakeQuantizedModel] = []
    check = llm_qat.check_written

    def keep(student: llm_qat.FakeQuantizedModel, run: Any) -> float:
        kept.append(student)
        return check(student, run)

    monkeypatch.setattr(llm_qat, "check_written", keep)
    return kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_logits_are_those_of_the_trained_model(
    shared_decoder: Callable[..., Path], tmp_path: Path, trained: list, architecture: str
) -> None:
    dense = shared_decoder(architecture, **ARCHITECTURES[architecture])
    lineage = quantized(dense, tmp_path / "out", steps=4)
    tokens = tokens_of(dense)
    with torch.no_grad():
        model = compress.load(tmp_path / "out")
        loaded = model(tokens).logits
        expected = trained[0].model(tokens, use_cache=False).logits
        before = compress.load(dense)(tokens).logits
    windows = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), "test")
    streamed = streamed_logits(Checkpoint.open(tmp_path / "out"), windows)

    assert (loaded - expected).abs().max() < 1e-4
    assert (streamed - expected).abs().max() < 1e-4  # evaluation takes this way
    assert (before - expected).abs().max() > 1e-2
    assert abs(lineage.steps[0].details["written_kl"]) < 1e-6
    kinds = {type(module) for module in model.modules() if isinstance(module, PackedLinear)}
    assert kinds == {TokenQuantizedLinear}
    assert lineage.result.bytes == lineage.result.predicted_bytes


def test_training_brings_the_model_back(shared_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense = shared_decoder()
    rounded = quantized(dense, tmp_path / "rtn", steps=0).steps[0].details["training"]
    tokens = tokens_of(dense)

    @torch.no_grad()
    def divergence(folder: Path) -> float:
        teacher = compress.load(dense)(tokens).logits.log_softmax(-1)
        student = compress.load(folder)(tokens).logits.log_softmax(-1)
        return float((teacher.exp() * (teacher - student)).sum(-1).mean())

    nearest = divergence(tmp_path / "rtn")
    assert rounded == {"steps": 0}
    for name, options in (("full", {}), ("lora", {"train": "lora", "rank": 4, "learning_rate": 5e-3})):
        training = quantized(dense, tmp_path / name, steps=24, **options).steps[0].details["training"]
        assert training["steps"] == len(training["losses"]) == 24
        assert training["last_loss"] < 0.7 * training["losses"][0]
        assert divergence(tmp_path / name) < 0.8 * nearest
    full, lora = (Checkpoint.open(tmp_path / name) for name in ("full", "lora"))
    kept = Checkpoint.open(dense)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(lora.read(name), kept.read(name))
        assert not torch.equal(full.read(name), kept.read(name))


def test_what_changes_the_training_and_what_does_not(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shared_decoder()

    def losses(**options: Any) -> list[float]:
        return quantized(dense, tmp_path / "out", **options).steps[0].details["training"]["losses"]

    first = losses(steps=3)
    assert losses(steps=3, gradient_checkpointing=True) == pytest.approx(first, rel=1e-5)
    assert losses(steps=3, gradient_cut=False)[1:] != first[1:]
    monkeypatch.setattr(distillation, "PASS_TOKENS", 1)
    two = losses(epochs=2)  # of 8 windows, 4 a step
    assert len(two) == 4
    assert two[0] == pytest.approx(first[0], rel=1e-5)
    assert losses(steps=3) == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models(
    shared_decoder: Callable[..., Path], tmp_path: Path, trained: list, dtype: str
) -> None:
    dense = shared_decoder()
    quantized(dense, tmp_path / "out", dtype, steps=3)
    tokens = tokens_of(dense)
    with torch.no_grad():
        loaded = compress.load(tmp_path / "out", dtype="float32")(tokens).logits
        expected = trained[0].model(tokens, use_cache=False).logits
    assert (loaded - expected).abs().max() < 1e-4
    stored = Checkpoint.open(tmp_path / "out").tensors
    wanted = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {stored[f"model.{name}"].dtype for name in ("norm.weight", "embed_tokens.weight")} == {wanted}
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == wanted


@torch.no_grad()
def stock_inputs(model: torch.nn.Module) -> None:
    """Quantize inputs as compressed-tensors 0.20 does: s = max|x| / 127.5, codes from −128 to 127."""

    def hook(linear: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / step).clamp(-128, 127).round() * step,)

    for module in model.modules():
        if isinstance(module, TokenQuantizedLinear):
            module.activation_bits, module.activations = None, "floating"
            module.register_forward_pre_hook(hook)
            module.product = super(TokenQuantizedLinear, module).product


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_stock_transformers(shared_decoder: Callable[..., Path], tmp_path: Path, weight_bits: int) -> None:
    dense, tokens = shared_decoder(), torch.arange(1, 25)[None]
    for bits in (16, 8):
        folder = tmp_path / f"A{bits}"
        lineage = quantized(dense, folder, steps=2, bits=weight_bits, activation_bits=bits, kv_bits=16)
        assert lineage.result.loads_with == "transformers with compressed-tensors"
    with torch.no_grad():
        stock = {bits: load_stock(tmp_path / f"A{bits}")(tokens).logits for bits in (16, 8)}
        ours = {bits: compress.load(tmp_path / f"A{bits}")(tokens).logits for bits in (16, 8)}
        emulated = compress.load(tmp_path / "A8")
        stock_inputs(emulated)
        assert (stock[16] - ours[16]).abs().max() < 1e-4
        assert (stock[8] - emulated(tokens).logits).abs().max() < 1e-4
        # The two grids differ by half a step in 127, which is what 8 bits lose anyway.
        assert 0 < (stock[8] - ours[8]).square().mean() < 1e-3 * ours[8].square().mean()


def load_stock(folder: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_evaluation_sees_activations_and_keys_and_values(
    shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = shared_decoder()
    quantized(dense, tmp_path / "out", steps=0)
    windows = Windows(tokens := torch.arange(1, 33)[None], torch.ones_like(tokens, dtype=torch.bool), "test")
    whole = streamed_logits(Checkpoint.open(tmp_path / "out"), windows)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[KEY] == {"bits": 4, "scale": "token", "position": "before-rope"}
    for name, change in (
        ("KV", lambda values: values.pop(KEY)),
        (
            "A",
            lambda values: values["quantization_config"]["config_groups"]["group_0"].pop("input_activations"),
        ),
    ):
        changed = Checkpoint.open(tmp_path / "out")
        changed.config = json.loads(json.dumps(config))
        change(changed.config)
        off = (streamed_logits(changed, windows) - whole).abs().max()
        assert off > 1e-3, name


def test_other_programs_checkpoints() -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    weights = {"num_bits": 4, "strategy": "channel"}

    def bits(**group: Any) -> int | None:
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, **group}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        return format_of(config).activation_bits

    assert bits(input_activations=inputs) == 8
    assert bits(input_activations=None) is None
    for wrong in ({"dynamic": False}, {"strategy": "tensor"}, {"type": "float"}, {"num_bits": 16}):
        with pytest.raises(BadInput, match="dynamic and per token"):
            bits(input_activations=inputs | wrong)
    with pytest.raises(BadInput, match="dynamic and per token"):
        bits(input_activations=inputs, output_activations=inputs)


def test_bits_by_pattern_and_packed_tables(
    shared_decoder: Callable[..., Path], tmp_path: Path, trained: list
) -> None:
    for tied in (False, True):
        dense = shared_decoder(tie_word_embeddings=tied)
        options = {"set": {"re:.*down_proj": 8}, "embedding_bits": 8} | ({} if tied else {"lm_head_bits": 8})
        out = tmp_path / f"out-{tied}"
        lineage = quantized(dense, out, steps=3, bits=4, **options)
        tokens = tokens_of(dense)
        with torch.no_grad():
            model = compress.load(out)
            loaded = model(tokens).logits
            expected = trained[-1].model(tokens, use_cache=False).logits

        assert (loaded - expected).abs().max() < 1e-4
        assert lineage.steps[0].details["linears_by_bits"] == {"4": 12, "8": 2}
        assert lineage.result.bytes == lineage.result.predicted_bytes
        assert type(model.model.layers[0].mlp.down_proj) is TokenQuantizedLinear
        assert model.model.layers[0].mlp.down_proj.bits == 8
        assert type(model.lm_head) is PackedLinear  # whose input is not quantized


def test_a_killed_training_goes_on(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shared_decoder()
    whole = quantized(dense, tmp_path / "whole", steps=6)
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    divergence, calls = distillation.divergence, []

    def killed(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return divergence(*arguments)

    monkeypatch.setattr(distillation, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(dense, tmp_path / "out", steps=6)
    found = quantized(dense, tmp_path / "out", steps=6)

    assert len(calls) == 4 + 3
    assert found.steps[0].resumed
    assert found.result.files == whole.result.files
    losses = [lineage.steps[0].details["training"]["losses"] for lineage in (whole, found)]
    assert losses[0] == losses[1]


def test_what_is_refused(
    shared_decoder: Callable[..., Path], tiny_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = shared_decoder()
    quantized(dense, tmp_path / "out", steps=0, ignore=["*.layers.0.*"])
    stored = Checkpoint.open(tmp_path / "out").tensors
    assert "model.layers.0.mlp.up_proj.weight" in stored
    assert "model.layers.1.mlp.up_proj.weight_packed" in stored
    with pytest.raises(BadInput, match="already quantized"):
        quantized(tmp_path / "out", tmp_path / "twice")
    with pytest.raises(BadInput, match="matches no linear"):
        quantized(dense, tmp_path / "none", ignore=["nothing"])
    with pytest.raises(BadInput, match="bits: Input should be 3, 4, 5, 6, 7 or 8"):
        quantized(dense, tmp_path / "none", bits=2)
    with pytest.raises(BadInput, match="distils next-token predictions"):
        quantized(tiny_encoder("BertForSequenceClassification"), tmp_path / "none")
    with pytest.raises(CompressError, match="lower the learning_rate"):
        quantized(dense, tmp_path / "none", steps=6, learning_rate=1e30)


def test_codes_that_are_not_what_was_trained_are_not_published(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_qat, "quantize_channels", wrong_codes(llm_qat.quantize_channels))
    with pytest.raises(CompressError, match="do not compute what was trained"):
        quantized(shared_decoder(), tmp_path / "out", steps=0)
    assert not (tmp_path / "out").exists()


def wrong_codes(quantize_channels: Callable[..., Any]) -> Callable[..., Any]:
    def quantize(*arguments: Any) -> Any:
        found = quantize_channels(*arguments)
        found.codes = found.codes.flip(0)
        return found

    return quantize


def test_what_is_written_is_checked_in_plain_torch(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the default bits, two kernels whose sums differ in the last place are tenths of a nat apart.
    kernels: list[str] = []

    def written(*arguments: Any) -> torch.Tensor:
        kernels.append(kernel_name())
        return streamed_logits(*arguments)

    monkeypatch.setattr(llm_qat, "streamed_logits", written)
    quantized(shared_decoder("LlamaForCausalLM"), tmp_path / "out", steps=0)
    assert kernels == [REFERENCE]


def test_tied_tables_that_are_stored_twice_stay_the_same(
    write_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = write_decoder(tmp_path / "dense", "Qwen3ForCausalLM", tie_word_embeddings=True, head_dim=16)
    weights = load_file(dense / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    save_file({**weights, head: weights[table].clone()}, dense / "model.safetensors", {"format": "pt"})
    quantized(dense, tmp_path / "out", train="full", steps=2)
    after = Checkpoint.open(tmp_path / "out")
    assert head not in after or torch.equal(after.read(head), after.read(table))
