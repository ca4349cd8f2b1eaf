"""Importance matrices of llama.cpp: written, read back, measured, and refused where they have no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import compress
from compress.calibration.text.windows import calibration_windows
from compress.cli import cli
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.sources.find import find_model
from compress.storage.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from compress.storage.gguf.writer import write_gguf

from .conftest import export_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", ["matrix.gguf", "matrix.dat"])
def test_importance_matrices_come_back(tmp_path: Path, name: str) -> None:
    values = {f"blk.{n}.attn_q.weight": torch.rand(64) for n in range(2)}
    write_imatrix(ImportanceMatrix(values, 8, 512, "text"), tmp_path / name)
    found = read_imatrix(tmp_path / name)
    assert found.chunks == 8
    assert found.dataset == "text"
    for key, expected in values.items():
        torch.testing.assert_close(found.values[key], expected)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_an_importance_matrix_is_measured_as_in_the_dense_model(
    tmp_path: Path, shared_decoder: Callable[..., Path], architecture: str
) -> None:
    model, file = shared_decoder(architecture), tmp_path / "model.imatrix.gguf"
    text = {"nsamples": 3, "seqlen": 32, "seed": 1}
    options = [word for key, value in text.items() for word in (f"--{key}", str(value))]
    source = str(model.parent / "text.txt")
    done = CliRunner().invoke(
        cli,
        ["export", str(model), "--format", "imatrix", "-o", str(file), "--calibration", source, *options],
        catch_exceptions=False,
    )
    assert "MB of importances, loads with llama.cpp's quantizer." in done.output
    found = read_imatrix(file)
    assert (found.chunks, found.chunk_size, found.dataset) == (3, 32, source)

    dense, seen = AutoModelForCausalLM.from_pretrained(model), []
    untied = not dense.config.tie_word_embeddings
    last = dense.base_model.get_submodule("layers.1.mlp.down_proj" if untied else "h.1.mlp.c_proj")
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        dense(calibration_windows(load_tokenizer(model), source, **text).tokens)
    expected = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(found.values["blk.1.ffn_down.weight"], expected, rtol=1e-4, atol=1e-6)
    said = export_gguf(model, tmp_path / "model.gguf", "--types", "Q4_0", "--importance", file)
    tables = 2 if untied else 1
    assert f"The importance matrix lacks {tables} of the rounded weights" in said


def test_an_importance_matrix_of_another_model_is_refused(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    file = tmp_path / "matrix.gguf"
    write_imatrix(ImportanceMatrix({"blk.0.attn_q.weight": torch.rand(32)}), file)
    with pytest.raises(BadInput, match="made for another model"):
        export_gguf(shared_decoder(), tmp_path / "m.gguf", "--types", "Q4_0", "--importance", file)


@pytest.mark.parametrize(("key", "value"), [("chunk_count", "x"), ("chunk_size", [1]), ("datasets", 3)])
def test_an_importance_matrix_without_sense_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "matrix.gguf"
    write_gguf(file, "imatrix", {"general.type": "imatrix", f"imatrix.{key}": value}, {})
    with pytest.raises(BadInput, match="does not say what text it was made on"):
        read_imatrix(file)


def test_measured_importance_makes_a_smaller_error(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder("LlamaForCausalLM")
    text = model.parent / "text.txt"
    given = ("--importance", "measured", "--calibration", text, "--nsamples", 4, "--seqlen", 64)
    for name, options in (("plain", ()), ("measured", given)):
        export_gguf(model, tmp_path / f"{name}.gguf", "--types", "Q4_0", *map(str, options))
    sizes = {(tmp_path / f"{name}.gguf").stat().st_size for name in ("plain", "measured")}
    assert len(sizes) == 1
    tokens = torch.tensor([load_tokenizer(model)(text.read_text()[:128]).input_ids])
    before, *others = (
        compress.load(folder, kernel="reference")(tokens).logits.log_softmax(-1)
        for folder in (
            model,
            *(find_model(str(tmp_path / f"{n}.gguf")).folder for n in ("plain", "measured")),
        )
    )
    plain, measured = (float((before.exp() * (before - other)).sum(-1).mean()) for other in others)
    assert measured < plain
