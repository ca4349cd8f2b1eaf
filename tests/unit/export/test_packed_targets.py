"""Exports that store packed linears: codes are carried over bit for bit, and read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.engine.opening import open_checkpoint
from compress.errors import BadInput
from compress.export.model import ExportedModel
from compress.kernels.codes.integer import QuantizedWeight
from compress.sources.find import ModelSource

Export = Callable[..., dict[str, Any]]


def opened(folder: Path) -> ExportedModel:
    return ExportedModel(ModelSource(str(folder), None, folder), open_checkpoint(folder))


def same_weights(one: Path, other: Path) -> None:
    """All packed linears of two folders stand for the same numbers."""
    before, after = opened(one), opened(other)
    linears = [name for name in before.packed if name in before.linears]
    assert linears
    for name in linears:
        assert torch.equal(before.dense(name), after.dense(name)), name


@pytest.mark.parametrize(
    ("target", "options", "flags"),
    [
        ("compressed-tensors", {"bits": 3, "group_size": 32, "symmetric": False, "embedding_bits": 8}, []),
        ("compressed-tensors", {"bits": 4, "group_size": 32, "set": {"*down_proj": 6}}, []),
        ("gptq", {"bits": 4, "group_size": 32}, []),
        ("gptq", {"bits": 3, "group_size": 32, "symmetric": False}, ["--version", "2"]),
        ("gptq", {"bits": 6, "group_size": "channel"}, ["--version", "1"]),
        ("awq", {"bits": 4, "group_size": 32, "symmetric": False}, []),
        ("awq", {"bits": 3, "group_size": 16}, []),
        ("mlx", {"bits": 4, "group_size": 32, "set": {"*down_proj": 6, "*up_proj": 3}}, []),
        ("mlx", {"bits": 7, "group_size": "channel", "embedding_bits": 5, "symmetric": True}, []),
    ],
)
def test_codes_are_carried_over(
    tmp_path: Path,
    export: Export,
    quantized: Callable[..., Path],
    target: str,
    options: Any,
    flags: list[str],
) -> None:
    source = quantized("rtn", **options)
    out = tmp_path / "out"
    record = export(source, "--format", target, "-o", out, "--no-verify", *flags)
    same_weights(source, out)
    there = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert record["result"]["bytes"] == there
    assert abs(record["result"]["predicted_bytes"] - there) <= 0.02 * there
    again = tmp_path / "again"
    export(out, "--format", "compressed-tensors", "-o", again, "--no-verify")
    same_weights(source, again)


@pytest.mark.parametrize(
    ("scale", "said"), [(0.0, "at most 0.10%"), (4.01e-5, "at most 0.10%"), (1e6, "is 1e+06, which float16")]
)
def test_a_scale_that_float16_cannot_hold_is_named(
    scale: float, said: str, tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    source, name = quantized("rtn", bits=4, group_size=32, dtype=torch.float32), "up_proj.weight_scale"
    tensors = load_file(source / "model.safetensors")
    next(tensor for key, tensor in tensors.items() if key.endswith(name))[0, 0] = scale
    save_file(tensors, source / "model.safetensors")
    words = (source, "--format", "gptq", "--version", "2", "-o", tmp_path / "out", "--no-verify")
    if scale > 1:
        with pytest.raises(BadInput, match=re.escape(said)):
            export(*words)
    else:
        (note,) = (note for note in export(*words)["exported"]["notes"] if note.startswith("Scales"))
        assert said in note


def test_a_head_that_is_the_packed_table_is_not_left_out(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    source = quantized("rtn", bits=4, group_size=32, embedding_bits=4, settings={"tie_word_embeddings": True})
    export(source, "--format", "compressed-tensors", "-o", tmp_path / "out", "--no-verify")
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (source, tmp_path / "out")
    )
    assert (after["ignore"], before["ignore"]) == ([], [])


def test_a_round_trip_gives_back_every_bit(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    """From compressed-tensors to GPTQ, AWQ and mlx, and back."""
    source = quantized("rtn", bits=4, group_size=32, symmetric=True, ignore=["lm_head"])
    wanted = load_file(source / "model.safetensors")
    for target in ("gptq", "awq", "mlx"):
        there, back = tmp_path / target, tmp_path / f"{target}-back"
        export(source, "--format", target, "-o", there, "--no-verify")
        export(there, "--format", "compressed-tensors", "-o", back, "--no-verify")
        found = load_file(back / "model.safetensors")
        for name, tensor in wanted.items():
            if name.endswith("weight_scale"):  # GPTQ and AWQ have float16
                assert torch.equal(found[name].float(), tensor.float()), (target, name)
            else:
                assert torch.equal(found[name], tensor), (target, name)


def test_awq_is_what_its_definition_says(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    """Decoded by hand: the word j of a row of inputs has output 8 j + place[i] in its i-th four bits."""
    source, out = quantized("rtn", bits=4, group_size=32, symmetric=False), tmp_path / "awq"
    export(source, "--format", "awq", "-o", out, "--no-verify")
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    words, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    width, out_features = words.shape[0], words.shape[1] * 8
    place = [0, 2, 4, 6, 1, 3, 5, 7]
    dense = torch.empty(out_features, width)
    for column in range(width):
        for word in range(words.shape[1]):
            for i in range(8):
                q = (int(words[column, word]) >> (4 * i)) & 15
                z = (int(zeros[column // 32, word]) >> (4 * i)) & 15
                row = 8 * word + place[i]
                dense[row, column] = (q - z) * scales[column // 32, row].float()
    assert torch.equal(dense, opened(source).dense(name))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq"
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_zero_points_of_0_need_version_2(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    source = quantized("rtn", bits=2, group_size=8, symmetric=False)
    model = opened(source)
    codes = [model.codes(name) for name in model.packed]
    assert any(isinstance(each, QuantizedWeight) and (each.zeros == 0).any() for each in codes)
    with pytest.raises(BadInput, match="use --version 2"):
        export(source, "--format", "gptq", "--version", "1", "-o", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_bitsandbytes_made_from_another_dtype_stays_as_it_is(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    """As a model that is quantized when it is loaded in another dtype than its config.json names."""
    source, out = quantized("nf4"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("bitsandbytes__nf4"):
            state = json.loads(bytes(tensors[name].tolist())) | {"dtype": "float16"}
            tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors")
    export(source, "--format", "bitsandbytes", "-o", out, "--no-verify")
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("target", ["compressed-tensors", "mlx"])
def test_a_cache_scheme_of_another_tool_is_not_dropped_in_silence(
    target: str,
    tmp_path: Path,
    export: Export,
    quantized: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = quantized("rtn", bits=4, group_size=32)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    scales = {f"model.layers.{layer}.self_attn.{which}_scale" for layer in (0, 1) for which in "kv"}
    save_file(tensors | {name: torch.ones(1) for name in scales}, source / "model.safetensors")
    open_checkpoint(source)
    assert "has a kv_cache_scheme of another tool, which is left out" in caplog.text
    export(source, "--format", target, "-o", tmp_path / "out", "--no-verify")
    caplog.clear()
    open_checkpoint(tmp_path / "out")
    assert "kv_cache_scheme" not in caplog.text
    assert not scales & load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("target", "method", "options", "complaint"),
    [
        ("gptq", "rtn", {"bits": 4, "set": {"*down_proj": 8}, "group_size": 32}, "export it as compressed"),
        ("awq", "rtn", {"bits": 5, "group_size": 32}, "integers of 5 bits, which awq does not have"),
        ("awq", "nf4", {}, "export it as huggingface"),
        ("gptq", "bitstack", {"blocks": 2}, "stored in blocks"),
        ("bitsandbytes", "rtn", {"bits": 4, "group_size": 32}, "--method nf4 or llm-int8"),
        ("mlx", "rtn", {"bits": 4, "group_size": 16}, "groups of 32, 64 or 128"),
        (
            "mlx",
            "rtn",
            {"bits": 4, "group_size": "channel", "settings": {"intermediate_size": 80}},
            "'model.layers.0.mlp.down_proj' has groups of 80 inputs",
        ),
        ("compressed-tensors", "nf4", {}, "export it as huggingface"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    tmp_path: Path,
    export: Export,
    quantized: Callable[..., Path],
    target: str,
    method: str,
    options: dict[str, Any],
    complaint: str,
) -> None:
    source = quantized(method, **options)
    with pytest.raises(BadInput, match=complaint):
        export(source, "--format", target, "-o", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_dense_model_is_not_rounded(
    tmp_path: Path, export: Export, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder(dtype=torch.bfloat16)
    for target in ("compressed-tensors", "gptq", "awq", "bitsandbytes", "mlx"):
        with pytest.raises(BadInput, match="an export rounds nothing"):
            export(model, "--format", target, "-o", tmp_path / "out")
