"""Checkpoints of other programs as MODEL: what they hold is read as their definitions say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import compress
from compress.cli import cli
from compress.errors import BadInput
from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.storage.formats.awq import AWQFormat
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.mlx import MLXFormat

TOKENS = torch.tensor([[7, 100, 31, 200, 5, 9]])
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}

Pack = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def packed_copy(
    model: Path,
    folder: Path,
    section: dict[str, Any],
    pack: Pack,
    key: str = "quantization_config",
    table: str = "",
) -> Path:
    """A copy of a model with packed linears, and one beside it (``-dense``) with what they stand for."""
    tensors = load_file(model / "model.safetensors")
    packed, dense = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEARS or module == table:
            del packed[name]
            made, dense[name] = pack(module, weight)
            packed |= made
    config = json.loads((model / "config.json").read_text())
    for target, content, extra in ((folder, packed, {key: section}), (Path(f"{folder}-dense"), dense, {})):
        target.mkdir()
        (target / "config.json").write_text(json.dumps({**config, **extra}))
        (target / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()}, target / "model.safetensors"
        )
    return folder


def same_logits(folder: Path) -> None:
    packed, dense = (compress.load(path, kernel="reference") for path in (folder, f"{folder}-dense"))
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS).logits, dense(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_mlx_with_real_offsets(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    """Offsets that are no multiples of the scale, a packed table, and two widths."""
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        bits = 8 if name.endswith("down_proj") else 4
        out, width = weight.shape
        codes = torch.randint(0, 2**bits, (out, width))
        scales, biases = torch.rand(out, width // 32) * 0.02 - 0.01, torch.randn(out, width // 32) * 0.05
        words = torch.zeros(out, width * bits // 32, dtype=torch.int64)
        for column in range(width):
            word, place = divmod(column * bits, 32)
            words[:, word] |= codes[:, column] << place
        dense = codes * scales.repeat_interleave(32, 1) + biases.repeat_interleave(32, 1)
        stored = (words - (words >= 2**31).long() * 2**32).to(torch.int32).view(torch.uint32)
        return {f"{name}.weight": stored, f"{name}.scales": scales, f"{name}.biases": biases}, dense

    model, section = shared_decoder(dtype=torch.float32), {"group_size": 32, "bits": 4}
    section |= {f"model.layers.{i}.mlp.down_proj": {"group_size": 32, "bits": 8} for i in range(2)}
    same_logits(packed_copy(model, tmp_path / "mlx", section, pack, "quantization", "model.embed_tokens"))
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "mlx"), "--json"])
    assert json.loads(done.stdout)["loads_with"] == "mlx-lm"


def test_gptq_in_activation_order(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        out, width = weight.shape
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
        zeros = torch.randint(1, 16, (out, width // 32), dtype=torch.uint8)
        scales = (torch.rand(out, width // 32) * 0.02).half()
        groups = torch.randperm(width) // 32
        made = GPTQFormat(4, 32, False, version=1).tensors(
            name, QuantizedWeight(codes, scales, zeros, 4, 32, False)
        )
        made[f"{name}.g_idx"] = groups.int()
        return made, (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]

    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    folder = packed_copy(shared_decoder(dtype=torch.float32), tmp_path / "gptq", section, pack)
    same_logits(folder)
    model = compress.load(folder, kernel="reference")
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    assert any(name.endswith("g_idx") for name in after)
    for target in ("compressed-tensors", "gptq", "awq", "mlx"):
        command = ["export", str(folder), "--format", target, "-o", str(tmp_path / "out"), "--no-verify"]
        done = CliRunner().invoke(cli, command)
        assert isinstance(done.exception, BadInput)
        assert "its groups or zero points are not those that config.json declares" in str(done.exception)


def test_gptq_that_is_called_symmetric_with_other_zero_points(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    """As ApiQ's own files, whose zero points are one below the middle."""
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        out, width = weight.shape
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
        scales = (torch.rand(out, width // 32) * 0.02).half()
        packed = QuantizedWeight(codes, scales, torch.full_like(scales, 7).to(torch.uint8), 4, 32, True)
        return GPTQFormat(4, 32, True, version=1).tensors(name, packed), packed.dequantize()

    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    folder = packed_copy(shared_decoder(dtype=torch.float32), tmp_path / "gptq", section, pack)
    same_logits(folder)
    compress.load(folder, kernel="reference").save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert all(torch.equal(after[name], before[name]) for name in before if "proj" in name)
    command = ["export", str(folder), "--no-verify", "-q", "-o", str(tmp_path / "out"), "--format"]
    for target in ("compressed-tensors", "gptq", "awq", "mlx"):  # which would take the zero points for 8
        done = CliRunner().invoke(cli, [*command, target])
        assert isinstance(done.exception, BadInput)
        assert "zero points are not those that config.json declares" in str(done.exception)


def test_w8a8_in_bytes(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        scales = torch.rand(len(weight), 1) * 0.001
        return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, codes.float() * scales

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    section["config_groups"] = {"group_0": group}
    same_logits(packed_copy(shared_decoder(dtype=torch.float32), tmp_path / "int8", section, pack))


def test_rotations_are_refused_unless_they_are_in_the_weights(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    """As llm-compressor describes the Hadamard transform before the last linear of an MLP."""

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = quantize_weight(weight, 4, -1, True, torch.float32)
        return CompressedTensorsFormat(4, -1, True).tensors(name, rounded), rounded.dequantize()

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    section = {**PACKED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}

    def rotated(*places: str) -> dict[str, Any]:
        apply = [{"targets": ["re:.*down_proj$"], "location": place} for place in places]
        return {
            **section,
            "transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": apply}}},
        }

    model = shared_decoder(dtype=torch.float32)
    same_logits(packed_copy(model, tmp_path / "in-weights", rotated("weight_output", "weight_input"), pack))
    folder = packed_copy(model, tmp_path / "online", rotated("weight_input", "input"), pack)
    with pytest.raises(BadInput, match="transform activations when they run"):
        compress.load(folder, kernel="reference")


def test_fp4_of_bitsandbytes(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="fp4", blocksize=64)
        made = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return made | {f"{name}.weight": codes}, functional.dequantize_4bit(codes, state)

    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    # On CPUs with AVX-512, bitsandbytes dequantizes blocks wrongly that lie in two rows.
    model = shared_decoder(dtype=torch.float32, intermediate_size=128)
    same_logits(packed_copy(model, tmp_path / "fp4", section, pack))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_awq_reads_back_every_bit(words: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out, width = 8 * words, 16 * groups

    def codes(columns: int) -> torch.Tensor:
        return torch.randint(0, 16, (out, columns), generator=generator, dtype=torch.uint8)

    scales = torch.rand(out, groups, generator=generator).half()
    weight = QuantizedWeight(codes(width), scales, codes(groups), 4, 16, False)
    form = AWQFormat(4, 16)
    stored = form.tensors("linear", weight)
    assert form.read("linear", stored.__getitem__).same_as(weight)
    infos = form.tensor_infos("linear", (out, width), "BF16")
    assert {name: info.shape for name, info in infos.items()} == {
        k: tuple(v.shape) for k, v in stored.items()
    }


@given(st.sampled_from(MLXFormat.widths), st.integers(1, 4), st.integers(0, 2**31))
def test_mlx_reads_back_every_bit(bits: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def codes(columns: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, (5, columns), generator=generator, dtype=torch.uint8)

    scales = (
        torch.rand(5, groups, generator=generator) * 0.1 + 1e-3
    )  # float32 holds offsets of bfloat16 scales
    weight = QuantizedWeight(codes(32 * groups), scales.bfloat16().float(), codes(groups), bits, 32, False)
    form = MLXFormat(bits, 32)
    assert form.read("linear", form.tensors("linear", weight).__getitem__).same_as(weight)


@pytest.mark.parametrize(
    ("section", "damage", "complaint"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, "layout 'gemv'"),
        ({"quant_method": "awq", "bits": "4"}, {}, "does not give bits"),
        ({"quant_method": "awq", "bits": 3}, {}, "no weights of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 24}, {}, "does not divide"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, {"qzeros": (1, 1)}, "has shape"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, {"qweight": (64,)}, "has shape"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, {}, "in the mode 'mxfp4'"),
        ({"bits": 4, "group_size": 48}, {}, "groups of 32, 64 or 128"),
        ({**PACKED, "config_groups": -1}, {}, "quantization_config of this model is damaged"),
        ({**PACKED, "config_groups": {"a": 1}}, {}, "quantization_config of this model is damaged"),
        ({**PACKED, "format": []}, {}, "quantization_config of this model is damaged"),
        (
            {**PACKED, "config_groups": {"a": {"targets": ["re:("], "weights": {"strategy": "channel"}}}},
            {},
            "quantization_config of this model is damaged",
        ),
        ({"quant_method": []}, {}, "quantization_config of this model is damaged"),
        ({"quant_method": "../../etc/passwd"}, {}, "cannot be read; these can"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    tmp_path: Path,
    shared_decoder: Callable[..., Path],
    section: dict[str, Any],
    damage: dict[str, tuple[int, ...]],
    complaint: str,
) -> None:
    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        out, width = weight.shape
        made = {"qweight": torch.zeros(width, out // 8, dtype=torch.int32)}
        made["qzeros"] = torch.zeros(width // 32, out // 8, dtype=torch.int32)
        made["scales"] = torch.ones(width // 32, out).half()
        made |= {part: torch.zeros(shape, dtype=torch.int32) for part, shape in damage.items()}
        return {f"{name}.{part}": tensor for part, tensor in made.items()}, weight

    folder = packed_copy(shared_decoder(dtype=torch.float32), tmp_path / "odd", section, pack)
    with pytest.raises(BadInput, match=complaint) as error:
        compress.load(folder, kernel="reference")
    assert "\n" not in str(error.value)
