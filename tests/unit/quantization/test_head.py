"""Heads are rounded by what they read: through recipes, exports and the ladders of mixing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.cli import cli
from compress.engine.shape import ModelShape
from compress.quantization.parts.gguf_ladder import GGUFLadder
from compress.quantization.parts.ladder import CodesLadder
from compress.quantization.round_to_nearest import RoundToNearest
from compress.sources.find import find_model
from compress.storage.checkpoint import Checkpoint

TABLES = {True: "model.embed_tokens.weight", False: "lm_head.weight"}
NAMES = {"embed_out", "lm_head"}


@torch.no_grad()
def head_inputs(folder: Path) -> Tensor:
    """The sum of x x^T over the text, with transformers alone: float64 [in, in]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    text = (folder.parent / "text.txt").read_text()[:512]
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    states = model.model(tokens).last_hidden_state[0]
    return states.T @ states


def table(folder: Path, tied: bool) -> Tensor:
    """The weight of the head as a program reads it, float64."""
    model = compress.load(folder, dtype="float32", kernel="reference")
    eye = torch.eye(64)
    with torch.no_grad():
        return model.get_output_embeddings()(eye).T.double()


def calibration(model: Path) -> dict[str, Any]:
    return {"source": str(model.parent / "text.txt"), "nsamples": 8, "seqlen": 64}


def loss(dense: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    off = rounded - dense
    return float((off @ hessian * off).sum())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq", "apiq"])
def test_a_method_that_looks_at_text_makes_a_smaller_error(
    tmp_path: Path, shared_decoder: Callable[..., Path], method: str, tied: bool
) -> None:
    model = shared_decoder("LlamaForCausalLM", dtype=torch.bfloat16, tie_word_embeddings=tied)
    hessian, dense = head_inputs(model), table(model, tied)
    losses = {}
    for name in ("rtn", method):
        step = {"method": name, "bits": 8, "group_size": 16, "symmetric": False}
        step["embedding_bits" if tied else "lm_head_bits"] = 3
        recipe = {"model": str(model), "calibration": calibration(model), "steps": [step]}
        compress.run(recipe, tmp_path / name)
        losses[name] = loss(dense, table(tmp_path / name, tied), hessian)
    assert losses[method] < 0.6 * losses["rtn"]


@pytest.mark.parametrize(("kind", "share"), [("Q4_0", 0.6), ("Q5_0", 0.95)])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_do_too(
    tmp_path: Path,
    shared_decoder: Callable[..., Path],
    kind: str,
    share: float,
    tied: bool,
) -> None:
    pytest.importorskip("gguf")
    from click.testing import CliRunner

    from compress.cli import cli

    model = shared_decoder("LlamaForCausalLM", dtype=torch.bfloat16, tie_word_embeddings=tied)
    hessian, dense = head_inputs(model), table(model, tied)
    types = tmp_path / "types.json"
    types.write_text(json.dumps({"token_embd.weight" if tied else "output.weight": kind}))
    losses = []
    text = ["--calibration", model.parent / "text.txt", "--nsamples", 8, "--seqlen", 64]
    for importance in ("none", "measured"):
        file = tmp_path / f"{importance}.gguf"
        call = ["export", model, "--format", "gguf", "--types", types, "--importance", importance, *text]
        done = CliRunner().invoke(cli, [*map(str, call), "-o", str(file), "--no-verify", "-q"])
        assert done.exit_code == 0, done.output
        losses.append(loss(dense, table(find_model(str(file)).folder, tied), hessian))
    assert losses[1] < share * losses[0]


def test_ladders_round_heads_as_methods_and_files_do(
    tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    shape = ModelShape.of(Checkpoint.open(shared_decoder("LlamaForCausalLM", tie_word_embeddings=True)))
    name, dense = "model.embed_tokens", torch.randn(257, 64)
    root = torch.randn(64, 64, dtype=torch.float64)
    hessian = root @ root.T
    codes, plain = (
        CodesLadder(shape, RoundToNearest.Options(group_size=16), [3, 4], tables="all", calibrated=calibrated)
        for calibrated in (True, False)
    )
    blocks = GGUFLadder(shape, None, tmp_path / "measured"), GGUFLadder(shape, None, tmp_path / "plain")
    (power,) = codes.powers(name)
    assert plain.powers(name) == (0.0,)
    for kind, aware, nearest in (("3", codes, plain), ("4", codes, plain), ("Q4_0", *blocks)):
        found, expected = (
            loss(dense, ladder.rounded(name, dense, kind, importance, power).double(), hessian)
            for ladder, importance, power in ((aware, hessian, power), (nearest, None, 0.0))
        )
        assert found < 0.9 * expected


@pytest.fixture
def both_names(tmp_path: Path, write_decoder: Callable[..., Path]) -> list[Path]:
    """One model twice. Files of Pythia call its head ``embed_out``, the class of transformers ``lm_head``."""
    stored = write_decoder(tmp_path / "one", "GPTNeoXForCausalLM", tie_word_embeddings=False)
    weights = load_file(stored / "model.safetensors")
    ours = next(name for name in NAMES if f"{name}.weight" in weights)
    (other,) = NAMES - {ours}
    renamed = tmp_path / "two"
    shutil.copytree(stored, renamed)
    weights[f"{other}.weight"] = weights.pop(f"{ours}.weight")
    save_file(weights, renamed / "model.safetensors")
    return [stored, renamed]


def test_a_head_is_rounded_alike_under_both_of_its_names(tmp_path: Path, both_names: list[Path]) -> None:
    step = {"method": "gptq", "bits": 4, "lm_head_bits": 4, "group_size": 16}
    heads = []
    for model in both_names:
        output = tmp_path / f"{model.name}-4"
        compress.run({"model": str(model), "steps": [step], "calibration": calibration(model)}, output)
        heads.append(table(output, tied=False))
    assert torch.equal(*heads)


@pytest.mark.parametrize("bits", [None, 4, 8])  # 4 bits are in one group with the linears
def test_a_head_is_declared_by_both_of_its_names(
    tmp_path: Path, both_names: list[Path], bits: int | None
) -> None:
    tokens = torch.arange(24).view(2, 12)
    for model in both_names:
        output, exported = tmp_path / f"{model.name}-packed", tmp_path / f"{model.name}-exported"
        step = {"method": "rtn", "bits": 4, "lm_head_bits": bits, "group_size": 16, "symmetric": True}
        compress.run({"model": str(model), "steps": [step]}, output)
        command = ["export", str(output), "--format", "compressed-tensors", "-o", str(exported)]
        done = CliRunner().invoke(cli, [*command, "--no-verify"])
        assert done.exit_code == 0, done.output
        for folder in (output, exported):
            section = json.loads((folder / "config.json").read_text())["quantization_config"]
            targets = {name for group in section["config_groups"].values() for name in group["targets"]}
            assert set(section["ignore"]) == (NAMES if bits is None else set())
            assert targets == {"Linear", *(NAMES if bits else ())}
            packed = compress.load(folder, dtype="float32", kernel="reference")
            stock = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                assert torch.allclose(packed(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_ignored_by_its_other_name_is_not_mixed(both_names: list[Path]) -> None:
    for model in both_names:
        shape = ModelShape.of(Checkpoint.open(model))
        options = RoundToNearest.Options(group_size=16, ignore=["lm_head"])
        assert not NAMES & CodesLadder(shape, options, [3, 4], tables="all", calibrated=False).sizes.keys()
