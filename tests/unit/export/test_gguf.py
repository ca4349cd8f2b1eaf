"""GGUF files: written, read back, converted to models again, and refused where they are damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.cli import cli
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.export.gguf import llama_log_probabilities
from compress.export.gguf_runtime import installed
from compress.kernels.codes.gguf import TYPES
from compress.sources.find import find_model
from compress.sources.gguf import bytes_of
from compress.storage.gguf.architectures import ARCHITECTURES
from compress.storage.gguf.reader import GGUFFile
from compress.storage.gguf.writer import Planned, write_gguf
from compress.system.files import file_sha256

from .conftest import export_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("own_cache")
TOKENS = torch.tensor([[7, 100, 31, 200, 5, 9]])
runs = pytest.mark.skipif(not installed(), reason="llama.cpp is not installed")
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
CASES = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA | {"num_hidden_layers": 6},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return compress.load(folder, dtype="float32", kernel="reference")(TOKENS).logits


@pytest.mark.parametrize("architecture", CASES)
def test_every_architecture_comes_back(
    tmp_path: Path, shared_decoder: Callable[..., Path], architecture: str
) -> None:
    model = shared_decoder(architecture, **CASES[architecture])
    file = tmp_path / "model.gguf"
    export_gguf(model, file, "--types", "F32")
    again = find_model(str(file)).folder
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.loaders
@runs
@pytest.mark.parametrize("architecture", CASES)
def test_llama_cpp_runs_every_architecture(
    tmp_path: Path, shared_decoder: Callable[..., Path], architecture: str
) -> None:
    model = shared_decoder(architecture, **CASES[architecture])
    arguments = ["export", str(model), "--format", "gguf", "-o", str(tmp_path / "m.gguf"), "--types", "F32"]
    done = CliRunner().invoke(cli, [*arguments, "--json", "-q"], catch_exceptions=False)
    found = json.loads(done.stdout)["exported"]["verification"]
    assert found["runtime"].startswith("llama.cpp (")
    assert found["kl"] < 1e-5


@pytest.mark.loaders
@runs
def test_llama_cpp_agrees_about_tokens_that_are_impossible(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model = tmp_path / "sure"
    shutil.copytree(shared_decoder("LlamaForCausalLM"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1000
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert logits(model).log_softmax(-1).min() < -200
    arguments = ["export", str(model), "--format", "gguf", "-o", str(tmp_path / "m.gguf"), "--types", "F32"]
    done = CliRunner().invoke(cli, [*arguments, "--json", "-q"], catch_exceptions=False)
    assert json.loads(done.stdout)["exported"]["verification"]["kl"] < 1e-3


@pytest.mark.loaders
@runs
@pytest.mark.parametrize(
    "fault",
    [{"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"attention.layer_norm_rms_epsilon": 1e-2}],
)
def test_a_file_of_block_types_that_says_something_else_is_not_published(
    tmp_path: Path,
    shared_decoder: Callable[..., Path],
    fault: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, llama = shared_decoder("LlamaForCausalLM"), ARCHITECTURES["llama"]
    arguments = ["export", str(model), "--format", "gguf", "--types", "Q8_0", "-q"]
    sound = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "sound.gguf")])
    assert "Verified with llama.cpp" in sound.output
    wrong = replace(llama, metadata=lambda config: llama.metadata(config) | fault)
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)
    ended = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "wrong.gguf")])
    assert "computes something else with the exported files" in str(ended.exception)
    assert not (tmp_path / "wrong.gguf").exists()


def test_codes_are_carried_over_without_rounding_again(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder("LlamaForCausalLM", dtype=torch.float16)
    for symmetric, kind in ((True, "Q4_0"), (False, "Q5_0")):
        low, file = tmp_path / f"low-{kind}", tmp_path / f"{kind}.gguf"
        step = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": symmetric}
        compress.run({"model": str(model), "steps": [step]}, low)
        export_gguf(low, file)
        written = GGUFFile.open(file)
        assert written.tensors["blk.0.ffn_down.weight"].kind.name == kind
        torch.testing.assert_close(logits(find_model(str(file)).folder), logits(low), atol=1e-5, rtol=1e-5)


def test_what_is_rounded_without_being_asked_for_is_one_sentence(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model, low = shared_decoder("LlamaForCausalLM", dtype=torch.float32), tmp_path / "low"
    sentence = "of the 21 tensors, such as 'lm_head.weight', are rounded to 16 bits; with --types F32"
    assert export_gguf(model, tmp_path / "half.gguf").count(sentence) == 1
    assert "16 bits" not in export_gguf(model, tmp_path / "whole.gguf", "--types", "F32")
    assert "16 bits" not in export_gguf(model, tmp_path / "asked.gguf", "--types", "F16")
    half = shared_decoder("LlamaForCausalLM", dtype=torch.float16)
    assert "16 bits" not in export_gguf(half, tmp_path / "same.gguf")
    compress.run({"model": str(model), "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}, low)
    said = export_gguf(low, tmp_path / "low.gguf")
    assert "The scales of 14 of the 14 weights in few bits, such as 'model.layers.0." in said
    assert said.count("rounded to float16") == 1


def test_an_adapter_is_in_the_file(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    """Codes alone would be another model, so the sum is stored, in float16."""
    low, file = tmp_path / "low", tmp_path / "low.gguf"
    step = {"method": "apiq", "bits": 3, "group_size": 32, "rank": 4, "steps": 8}
    calibration = {"source": "bundled", "nsamples": 2, "seqlen": 32}
    model = shared_decoder("LlamaForCausalLM", dtype=torch.float16)
    compress.run({"model": str(model), "calibration": calibration, "steps": [step]}, low)
    export_gguf(low, file)
    assert GGUFFile.open(file).tensors["blk.0.ffn_down.weight"].kind.name == "F16"
    wanted = logits(low)
    off = logits(find_model(str(file)).folder) - wanted
    assert float(off.square().mean().sqrt() / wanted.std()) < 1e-3


def test_inspect_shows_the_file_and_its_record(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    file = tmp_path / "model.gguf"
    export_gguf(shared_decoder("LlamaForCausalLM"), file, "--types", "Q8_0")
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(file), "--json", "-q"]).stdout)
    assert shown["loads_with"] == "llama.cpp and the programs built on it"
    assert shown["bytes"] == sum(shown["bytes_per_part"].values()) == sum(shown["dtypes"].values())
    assert 0 < file.stat().st_size - shown["bytes"] < 200_000  # which is its header, mostly the vocabulary
    assert 8 * 34 / 32 <= shown["bits_per_parameter"] < 9  # blocks of 32 codes and a scale of float16
    assert not (tmp_path / "cache" / "gguf").exists()  # nothing was unpacked
    assert shown["lineage"]["exported"]["target"] == "gguf"
    file.with_name("model.gguf.compression.json").unlink()
    assert "did not write this model" in CliRunner().invoke(cli, ["inspect", str(file), "-q"]).stdout
    with pytest.raises(BadInput, match="is not a hub model"):
        find_model(str(file), "main")


def test_a_file_has_its_own_record(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    """No text that it was calibrated on scores it, or what is made of it; evaluations are kept in it."""
    model, file, again = shared_decoder("LlamaForCausalLM"), tmp_path / "file.gguf", tmp_path / "again"
    text, other = str(model.parent / "text.txt"), str(tmp_path / "other.txt")
    Path(other).write_text(Path(text).read_text()[::-1])
    given = ("--importance", "measured", "--calibration", text, "--nsamples", "2", "--seqlen", "32")
    export_gguf(model, file, "--types", "Q4_0", *given)
    compress.run({"model": str(file), "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}, again)
    for result in (file, again):
        with pytest.raises(BadInput, match="was calibrated on 1 of the documents"):
            compress.evaluate(str(result), text=text, context=32)
    compress.evaluate(str(file), baseline=str(model), text=other, context=32)
    assert [row.scorecard.model.name for row in compress.compare(file).rows] == [model.name, str(file)]


@pytest.mark.parametrize("longer", [True, False])
def test_the_record_of_another_file_is_not_believed(
    longer: bool, tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model, file = shared_decoder("LlamaForCausalLM"), tmp_path / "file.gguf"
    export_gguf(model, file, "--types", "Q4_0")
    data = file.read_bytes()
    file.write_bytes(data + b"x" if longer else data[:-40] + b"\1" + data[-39:])
    with pytest.raises(BadInput, match=r"is of another file than 'file\.gguf' is now; move it away"):
        find_model(str(file))
    if longer:  # the length alone tells it, so nothing has to be hashed
        with pytest.raises(BadInput, match="is of another file"):
            compress.compare(file)
        done = CliRunner().invoke(cli, ["inspect", str(file), "-q"])
        assert isinstance(done.exception, BadInput)
    file.with_name("file.gguf.compression.json").unlink()
    assert find_model(str(file)).stored == file


def test_a_file_never_lies_beside_the_record_of_another(
    tmp_path: Path, shared_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever an export is killed while it is published."""
    model, file = shared_decoder("LlamaForCausalLM"), tmp_path / "file.gguf"
    record = file.with_name("file.gguf.compression.json")
    move = Path.replace
    for last in (0, 1):
        export_gguf(model, file, "--types", "Q4_0", "--overwrite")
        moved: list[Path] = []

        def killed(path: Path, target: Path, last: int = last, moved: list[Path] = moved) -> Path:
            if target in (file, record):
                if len(moved) == last:
                    raise KeyboardInterrupt
                moved.append(target)
            return move(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", killed)
            with contextlib.suppress(KeyboardInterrupt, SystemExit, click.Abort):
                export_gguf(model, file, "--types", "Q8_0", "--overwrite")
        assert len(moved) == last
        if record.exists():
            assert list(json.loads(record.read_text())["result"]["files"].values()) == [file_sha256(file)]


def test_types_of_a_file_are_taken_and_checked(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    model = shared_decoder("LlamaForCausalLM")
    types = tmp_path / "types.json"
    types.write_text(json.dumps({"blk.0.attn_q.weight": "Q4_1", "token_embd.weight": "Q8_0"}))
    export_gguf(model, tmp_path / "model.gguf", "--types", types)
    found = GGUFFile.open(tmp_path / "model.gguf").tensors
    assert found["blk.0.attn_q.weight"].kind.name == "Q4_1"
    assert found["blk.1.attn_q.weight"].kind.name == "F16"
    for wrong, message in (
        ({"blk.9.attn_q.weight": "Q4_1"}, "no weight"),
        ({"blk.0.attn_q.weight": "Q4_K"}, "blocks"),
    ):
        types.write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=message):
            export_gguf(model, tmp_path / "other.gguf", "--types", types)
    assert not (tmp_path / "other.gguf").exists()


@pytest.fixture
def sound(tmp_path: Path, shared_decoder: Callable[..., Path]) -> bytes:
    export_gguf(shared_decoder(), tmp_path / "sound.gguf", "--types", "Q8_0")
    return (tmp_path / "sound.gguf").read_bytes()


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, sound: bytes) -> None:
    bad = tmp_path / "bad.gguf"
    huge = struct.pack("<Q", 2**60)
    for data, message in (
        (b"", "too short"),
        (b"PK" + sound[2:], "does not begin with 'GGUF'"),
        (sound[:4] + struct.pack("<I", 9) + sound[8:], "version 9"),
        (sound[:8] + huge + sound[16:], "more than it has room for"),
        (sound[:16] + huge + sound[24:], "more than it has room for"),
        (sound[:100], "more than it has room for|middle of its header"),
        (sound[: len(sound) // 2], "beyond the end|middle of its header"),
    ):
        bad.write_bytes(data)
        with pytest.raises(BadInput, match=message):
            find_model(str(bad))
    assert not list((tmp_path / "cache").glob("gguf/*/config.json"))


def test_a_file_without_a_tensor_of_its_model_is_refused(tmp_path: Path, sound: bytes) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(sound.replace(b"blk.1.ffn_up.weight", b"../1.ffn_up.weight/"[:19]))
    with pytest.raises(BadInput, match=r"lacks the tensor 'blk.1.ffn_up.weight'"):
        find_model(str(bad))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.key_length", 15, "heads of odd width"),
        ("llama.attention.key_length", 6, "holds 'blk.0.attn_q.weight' in the shape"),
        ("llama.attention.head_count_kv", 2**31 - 1, "holds 'blk.0.attn_k.weight' in the shape"),
        ("tokenizer.ggml.token_type", 3, "The tokenizer of '.*' cannot be read"),
        ("tokenizer.ggml.tokens", [1, 2], "The tokenizer of '.*' cannot be read"),
        ("tokenizer.ggml.pre", 3, "splits text as '3'"),
    ],
)
def test_metadata_without_sense_are_refused_in_one_sentence(
    tmp_path: Path, sound: bytes, key: str, value: Any, message: str
) -> None:
    bad = tmp_path / "bad.gguf"
    assert (tmp_path / "sound.gguf").read_bytes() == sound
    assert key in GGUFFile.open(tmp_path / "sound.gguf").metadata
    rewrite(tmp_path / "sound.gguf", bad, "llama", {key: value})
    with pytest.raises(BadInput, match=message):
        find_model(str(bad))


def test_layers_that_are_no_whole_number(tmp_path: Path, shared_decoder: Callable[..., Path]) -> None:
    export_gguf(shared_decoder("Gemma2ForCausalLM", **GEMMA), tmp_path / "sound.gguf", "--types", "Q8_0")
    rewrite(tmp_path / "sound.gguf", tmp_path / "bad.gguf", "gemma2", {"gemma2.block_count": 2.0})
    with pytest.raises(BadInput, match=r"gives 2\.0 for 'gemma2\.block_count', a whole number"):
        find_model(str(tmp_path / "bad.gguf"))


def test_a_tensor_that_the_model_does_not_have_is_not_left_out(tmp_path: Path, sound: bytes) -> None:
    more = torch.ones(64)
    extra = {"blk.0.attn_sinks.weight": Planned(TYPES["F32"], (64,), lambda: TYPES["F32"].encode(more[None]))}
    rewrite(tmp_path / "sound.gguf", tmp_path / "bad.gguf", "llama", {}, extra)
    with pytest.raises(BadInput, match=r"holds 'blk\.0\.attn_sinks\.weight', which no llama model"):
        find_model(str(tmp_path / "bad.gguf"))


def rewrite(
    sound: Path,
    bad: Path,
    architecture: str,
    values: dict[str, Any],
    tensors: dict[str, Planned] | None = None,
) -> None:
    """Write a file again with other metadata, and with more tensors."""
    file = GGUFFile.open(sound)
    metadata = {name: kept for name, kept in file.metadata.items() if name != "general.architecture"}
    planned = {
        name: Planned(there.kind, there.shape, partial(file.blocks, name))
        for name, there in file.tensors.items()
    }
    write_gguf(bad, architecture, metadata | values, planned | (tensors or {}))


@pytest.mark.parametrize("room", [1000, 150_000, 250_000])
def test_a_disk_that_is_full_is_the_reason_and_leaves_nothing(
    tmp_path: Path, shared_decoder: Callable[..., Path], room: int
) -> None:
    """A limit on the size of files stands for the disk; it ends a write in the same way."""
    resource = pytest.importorskip("resource")
    model, limits = shared_decoder(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="File too large") as error:
            export_gguf(model, tmp_path / "model.gguf", "--types", "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


@given(at=st.integers(0, 3000), byte=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    data = bytearray(HEADER)
    data[at % len(data)] = byte
    path.write_bytes(data)
    with contextlib.suppress(BadInput):
        GGUFFile.open(path)


def _header() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    values += text("list") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, 8, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + values + tensor
    return head + bytes(-len(head) % 32) + bytes(4 * 34)


HEADER = _header()


@pytest.mark.loaders
@runs
def test_replaceme_and_four_bits_answer_the_same_in_transformers_and_llama_cpp(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    """transformers runs the packed folder, llama.cpp the file with the same codes, on inputs of 8 bits."""

    model = shared_decoder("LlamaForCausalLM", dtype=torch.float16, num_hidden_layers=4)
    text = {"source": str(model.parent / "text.txt"), "nsamples": 2, "seqlen": 64}
    steps = [{"method": "replaceme", "layers": 1}, {"method": "rtn", "bits": 4, "group_size": 32}]
    compress.run({"model": str(model), "calibration": text, "steps": steps}, tmp_path / "low")
    done = CliRunner().invoke(
        cli,
        ["export", str(tmp_path / "low"), "--format", "gguf", "-o", str(tmp_path / "m.gguf"), "--json", "-q"],
    )
    assert json.loads(done.stdout)["exported"]["verification"]["kl"] < 0.01
    tokens = torch.tensor([load_tokenizer(model)("It was the best of times").input_ids])
    with torch.no_grad():
        low = AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype=torch.float32)
        ours = low(tokens).logits.log_softmax(-1)
    theirs = llama_log_probabilities(tmp_path / "m.gguf", tokens)
    assert float((ours - theirs).square().mean().sqrt() / ours.std()) < 0.1
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def test_a_tied_head_that_llama_cpp_needs_is_written_as_the_table_is(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    file = tmp_path / "model.gguf"
    export_gguf(shared_decoder("GPTNeoXForCausalLM", tie_word_embeddings=True), file, "--types", "Q4_K_M")
    tensors = GGUFFile.open(file).tensors
    assert tensors["output.weight"].kind is tensors["token_embd.weight"].kind
    types = tmp_path / "types.json"
    types.write_text('{"token_embd.weight": "Q8_0"}')
    with pytest.raises(BadInput, match="need the same type"):
        export_gguf(
            shared_decoder("GPTNeoXForCausalLM", tie_word_embeddings=True),
            file,
            "--types",
            types,
            "--overwrite",
        )


def test_the_file_that_a_result_is_made_of_is_never_replaced(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    folder, file = tmp_path / "mine", tmp_path / "mine" / "model.gguf"
    export_gguf(shared_decoder(), folder, "--types", "F16")
    (written,) = folder.glob("*.gguf")
    written.rename(file)
    before = file.read_bytes()
    for output in (folder, file):
        with pytest.raises(BadInput, match="holds the model to export"):
            export_gguf(file, output, "--types", "Q8_0", "--overwrite")
    with pytest.raises(BadInput, match="holds the model to compress"):
        compress.run({"model": str(file), "steps": [{"method": "rtn"}]}, folder, overwrite=True)
    assert file.read_bytes() == before


def test_a_folder_with_a_file_is_replaced_and_what_is_made_of_it_has_its_own_size(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    folder, made = tmp_path / "folder", tmp_path / "made"
    for types in ("F16", "Q8_0"):
        export_gguf(shared_decoder(), folder, "--types", types, "--overwrite")
    (file,) = folder.glob("*.gguf")
    compress.run({"model": str(file), "steps": [{"method": "rtn", "bits": 2}]}, made)
    assert bytes_of(made) is None
    assert bytes_of(find_model(str(file)).folder) is not None
