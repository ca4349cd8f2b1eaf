"""Bits per module, and packed heads and embeddings, through the run to the loaded model."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compress
from compress.commands.inspect import bytes_per_part
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.evaluation.timed import token_ids
from compress.kernels.cpu.library import use
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.linear import PackedLinear
from compress.method import StepContext
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization.gptq import GPTQ
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.table import Formats

SIZE = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "llama-tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "gemma3": lambda: hf.Gemma3TextConfig(**GQA, head_dim=16, sliding_window=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZE, intermediate_size=96),
    "gpt2": lambda: hf.GPT2Config(**SIZE, bos_token_id=0, eos_token_id=0),
    "opt": lambda: hf.OPTConfig(**SIZE, ffn_dim=96, word_embed_proj_dim=32),
    "phi3": lambda: hf.Phi3Config(**GQA, pad_token_id=0),
}
MIXED = {"re:.*\\.0\\..*down": 8, "*.v_proj": 2, "model.layers.1.self_attn.v_proj": 3}
TOKENS = torch.arange(40).view(2, 20)


def make(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def quantize(model: Path, output: Path, **options: object) -> Path:
    step = {"method": "rtn", "group_size": 32, **options}
    execute(parse_recipe({"model": str(model), "steps": [step]}), output)
    return output


def dequantized(model: Path, packed: Path) -> hf.PreTrainedModel:
    """The dense model with what the packed tensors stand for."""
    dense = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stored = Checkpoint.open(packed)
    formats = Formats(stored.config["quantization_config"])
    names = [name.removesuffix(".weight_packed") for name in stored.tensors if name.endswith("_packed")]
    for name in names:
        module = dense.get_output_embeddings() if name == "embed_out" else dense.get_submodule(name)
        kind = "Embedding" if isinstance(module, torch.nn.Embedding) else "Linear"
        value = formats.of(name, kind).read(name, stored.read).dequantize()
        module.weight.data = (value.T if "Conv1D" in type(module).__name__ else value).to(module.weight)
    return dense


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits.float()


@torch.no_grad()
def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())


def loads_with(folder: Path) -> str:
    return json.loads((folder / "compression.json").read_text())["result"]["loads_with"]


def test_the_last_pattern_that_matches_counts(tmp_path: Path) -> None:
    packed = quantize(make(tmp_path / "dense"), tmp_path / "packed", set=MIXED)
    model = compress.load(packed)
    bits = {name: part.bits for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    assert len(bits) == 14
    assert {name: width for name, width in bits.items() if width != 4} == {
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.1.self_attn.v_proj": 3,
    }
    report = json.loads((packed / "compression.json").read_text())["steps"][0]["details"]
    assert report["linears_by_bits"] == {"2": 1, "3": 1, "4": 11, "8": 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_mixed_bits_with_a_packed_head_and_embedding(name: str, tmp_path: Path) -> None:
    symmetric = name not in ("llama", "gemma3", "opt")
    dense = make(tmp_path / "dense", name)
    options = {"set": {"re:.*(down_proj|fc2|c_proj|4h_to_h)": 8}, "lm_head_bits": 8, "embedding_bits": 8}
    packed = quantize(dense, tmp_path / "packed", bits=3, symmetric=symmetric, **options)
    expected = logits(dequantized(dense, packed))
    model = compress.load(packed)
    assert {type(model.get_input_embeddings()), type(model.get_output_embeddings())} == {
        PackedEmbedding,
        PackedLinear,
    }
    assert close(logits(model), expected)
    windows = Windows(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), source="numbers")
    assert close(streamed_logits(Checkpoint.open(packed), windows), expected)
    assert loads_with(packed) == "compress-model only"
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 8)


def test_a_table_that_serves_embedding_and_head_is_stored_and_held_once(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", "llama-tied", torch.bfloat16)
    packed = quantize(dense, tmp_path / "packed", embedding_bits=8)
    stored = Checkpoint.open(packed).tensors
    assert [name for name in stored if "lm_head" in name] == []
    assert stored["model.embed_tokens.weight_packed"].shape == (96, 64 * 8 // 32)
    assert bytes_per_part(ModelShape.of(Checkpoint.open(packed)))["embeddings"] == 96 * (64 + 2 * 2 + 2) + 16
    result = json.loads((packed / "compression.json").read_text())["result"]
    assert result["bytes"] == result["predicted_bytes"] == Checkpoint.open(packed).nbytes

    model = compress.load(packed)
    assert model.lm_head is model.model.embed_tokens.table
    assert int(token_ids(model, 500, torch.device("cpu")).max()) == 95  # what `evaluate` times it with
    reference = logits(model.to(torch.float64).to(torch.float32))
    assert model.lm_head is model.model.embed_tokens.table
    assert model.model.embed_tokens.table.scales.dtype == torch.bfloat16
    assert close(reference, logits(dequantized(dense, packed)))
    for option in ({"lm_head_bits": 8}, {"lm_head_bits": 8, "embedding_bits": 8}):
        again = quantize(dense, tmp_path / f"again-{len(option)}", **option)
        assert Checkpoint.open(again).tensors == stored


@pytest.mark.parametrize(
    ("bits", "symmetric", "kernel"),
    [
        *((bits, bits % 2 == 0, "auto") for bits in (2, 3, 4, 5, 6, 7)),
        *((bits, bits % 2 == 1, "reference") for bits in (3, 5, 6)),
    ],
)
def test_the_table_can_have_any_bits(bits: int, symmetric: bool, kernel: str, tmp_path: Path) -> None:
    """As embedding and as tied head, through the packed kernels; linears have other bits."""
    use(kernel)
    dense = make(tmp_path / "dense", "llama-tied")
    packed = quantize(dense, tmp_path / "packed", bits=4, symmetric=symmetric, embedding_bits=bits)
    words = Checkpoint.open(packed).tensors["model.embed_tokens.weight_packed"].shape
    assert words == (96, 64 * bits // 32)
    model = compress.load(packed)
    assert model.lm_head is model.model.embed_tokens.table
    expected = dequantized(dense, packed)
    assert close(logits(model), logits(expected))
    rows = model.get_input_embeddings()(TOKENS)
    assert torch.equal(rows, expected.get_input_embeddings()(TOKENS))


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_an_untied_table_and_head_can_have_different_bits(bits: int, tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", "llama")
    packed = quantize(dense, tmp_path / "packed", embedding_bits=bits, lm_head_bits=11 - bits)
    model = compress.load(packed)
    assert model.model.embed_tokens.table.bits == bits
    assert model.lm_head.bits == 11 - bits
    assert close(logits(model), logits(dequantized(dense, packed)))


def test_a_copy_of_the_shared_table_goes_away(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", "llama-tied")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    packed = quantize(dense, tmp_path / "packed", lm_head_bits=8)
    assert [name for name in Checkpoint.open(packed).tensors if "lm_head" in name] == []
    assert close(logits(compress.load(packed)), logits(dequantized(dense, packed)))


def test_an_encoder_has_an_embedding_and_maybe_no_head(tiny_encoder, tmp_path: Path) -> None:
    dense = tiny_encoder("BertForMaskedLM")
    packed = quantize(dense, tmp_path / "packed", group_size=16, lm_head_bits=8)  # tied, and with a bias
    model, expected = compress.load(packed), hf.BertForMaskedLM.from_pretrained(dense)
    stored = Checkpoint.open(packed)
    for name in {name.rpartition(".")[0] for name in stored.tensors if name.endswith("weight_packed")}:
        form = Formats(stored.config["quantization_config"]).of(name)
        expected.get_submodule(name).weight.data = form.read(name, stored.read).dequantize()
    tokens = TOKENS[:, :8] % 20
    assert close(model(tokens).logits, expected(tokens).logits)
    assert model.cls.predictions.decoder is model.bert.embeddings.word_embeddings.table

    shape = ModelShape.of(Checkpoint.open(tiny_encoder("MPNetModel", "headless")))
    RoundToNearest().plan(shape, RoundToNearest.Options(group_size=16, embedding_bits=8))
    with pytest.raises(BadInput, match="no projection to the vocabulary"):
        RoundToNearest().plan(shape, RoundToNearest.Options(group_size=16, lm_head_bits=8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"set": {"*.nosuch": 8}}, r"'\*\.nosuch' in 'set' matches no linear"),
        ("llama", {"set": {"lm_head": 8}}, "'lm_head' in 'set' matches no linear"),
        ("llama", {"set": {"re:(": 8}}, "'re:\\(' in 'set' is not a regular expression"),
        (
            "llama",
            {"format": "gptq", "set": MIXED},
            "several bit widths or group sizes; use the",
        ),
        ("llama", {"format": "gptq", "bits": 8, "lm_head_bits": 8}, "use the format compressed-tensors"),
        ("llama", {"lm_head_bits": 8, "ignore": ["lm_head"]}, "'ignore' keeps 'lm_head', but lm_head_bits"),
        (
            "llama-tied",
            {"embedding_bits": 8, "ignore": ["lm_head"]},
            "'ignore' keeps 'lm_head', but lm_head_bits",
        ),
        ("llama-tied", {"lm_head_bits": 8, "embedding_bits": 4}, "one table; give only one of"),
    ],
)
def test_bad_options(name: str, options: dict, message: str, tmp_path: Path) -> None:
    shape = ModelShape.of(Checkpoint.open(make(tmp_path, name)))
    with pytest.raises(BadInput, match=message):
        RoundToNearest().plan(shape, RoundToNearest.Options(group_size=32, **options))


def test_bits_that_do_not_exist() -> None:
    with pytest.raises(BadInput, match=r"In steps.0 \(rtn\): set: Input should be 2, .* 7 or 8 \(got 9\)"):
        parse_recipe({"model": "m", "steps": [{"method": "rtn", "set": {"*": 9}}]})


@pytest.mark.parametrize(
    ("options", "symmetric", "loader"),
    [
        ({"bits": 3}, False, "transformers with compressed-tensors"),
        ({"bits": 4, "set": {"*": 2}}, False, "transformers with compressed-tensors"),
        ({"bits": 3, "set": {"*.v_proj": 4}}, True, "transformers with compressed-tensors"),
        ({"bits": 4, "mix": True}, True, "transformers with compressed-tensors"),
        ({"bits": 4, "lm_head_bits": 8}, True, "transformers with compressed-tensors"),
        ({"bits": 4, "embedding_bits": 8}, False, "compress-model only"),
    ],
)
def test_zero_points_are_fixed_where_transformers_needs_it(
    options: dict, symmetric: bool, loader: str, tmp_path: Path
) -> None:
    shape = ModelShape.of(Checkpoint.open(make(tmp_path)))
    planned = RoundToNearest().plan(shape, RoundToNearest.Options(group_size=32, **options))
    schemes = planned.config["quantization_config"]["config_groups"].values()
    assert {scheme["weights"]["symmetric"] for scheme in schemes} == {symmetric}
    assert str(planned.loads_with) == loader


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_gptq_rounds_linears_with_the_same_input_to_different_bits(name: str, tmp_path: Path) -> None:
    """In the first layer, whose inputs do not depend on bits, each is rounded as it would be on its own."""
    dense = make(tmp_path / "dense", name)
    windows = Windows(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), source="numbers")
    wide = "*.q_proj" if name == "llama" else "*.qkv_proj"

    def run(work: str, **options: object) -> Draft:
        checkpoint, folder = Checkpoint.open(dense), tmp_path / work
        draft = Draft(checkpoint, folder)
        step = StepContext(draft, windows, 0, folder, "cpu", lambda text, share: None)
        options = GPTQ.Options(group_size=32, symmetric=False, **options)
        GPTQ().apply(StreamedModel(checkpoint), options, step)
        return draft

    mixed, four, eight = run("mixed", set={wide: 8}), run("four"), run("eight", bits=8)
    first = [name for name in mixed.tensors if ".layers.0.self_attn" in name and name.endswith("_packed")]
    for tensor in first:
        alone = eight if fnmatchcase(tensor.removesuffix(".weight_packed"), wide) else four
        assert torch.equal(mixed.read(tensor), alone.read(tensor)), tensor
    assert len(first) >= 2
