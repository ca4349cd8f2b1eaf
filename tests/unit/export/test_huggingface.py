"""Export to dense safetensors, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.engine.shape import ModelShape
from compress.errors import BadInput, CompressError
from compress.storage.checkpoint import Checkpoint

Export = Callable[..., dict[str, Any]]

TOKENS = torch.tensor([[7, 100, 31, 200, 5, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize(
    ("method", "options", "architecture"),
    [
        ("rtn", {"bits": 3, "group_size": 32, "embedding_bits": 8, "symmetric": False}, "LlamaForCausalLM"),
        ("rtn", {"bits": 4, "group_size": 32}, "GPT2LMHeadModel"),
        ("bitstack", {"blocks": 2}, "GPT2LMHeadModel"),
        ("nested", {"bits": 4}, "LlamaForCausalLM"),
        ("float", {"type": "mxfp4"}, "LlamaForCausalLM"),
        ("apiq", {"bits": 3, "group_size": 32, "rank": 2, "epochs": 1}, "LlamaForCausalLM"),
    ],
)
def test_every_kind_of_codes_unpacks_to_what_it_computes(
    tmp_path: Path,
    export: Export,
    tiny_decoder: Callable[..., Path],
    method: str,
    options: dict[str, Any],
    architecture: str,
) -> None:
    settings = {"tie_word_embeddings": True}
    model = tiny_decoder(architecture, dtype=torch.float32, **settings)
    text = {"source": str(tmp_path / "text.txt"), "nsamples": 2, "seqlen": 32}
    recipe = {"model": str(model), "calibration": text, "steps": [{"method": method, **options}]}
    compress.run(recipe, tmp_path / "low")
    record = export(tmp_path / "low", "--format", "huggingface", "-o", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(
        logits(plain), logits(compress.load(tmp_path / "low", kernel="reference")), atol=1e-4, rtol=1e-4
    )
    assert all(
        tensor.dtype == torch.float32
        for tensor in load_file(tmp_path / "plain" / "model.safetensors").values()
    )
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    found = record["exported"]["verification"]
    assert found["not_tried"] is None
    assert found["kl"] < 1e-6
    assert found["agreement"] == 1
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "Verified with transformers" in card
    assert record["parent"]["lineage"]["steps"][0]["method"] == method


def test_what_was_packed_for_mlx_is_plain_again(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    """mlx declares codes under a name of its own, which is not left behind."""
    source = quantized("rtn", bits=4, group_size=32)
    export(source, "--format", "mlx", "-o", tmp_path / "mlx", "--no-verify")
    export(tmp_path / "mlx", "--format", "huggingface", "-o", tmp_path / "plain", "--no-verify")
    compress.run({"model": str(tmp_path / "plain"), "steps": [{"method": "rtn"}]}, tmp_path / "again")
    plain = ModelShape.of(Checkpoint.open(tmp_path / "plain"))
    assert str(plain.loads_with) == "transformers"


def test_a_dense_model_changes_its_dtype(
    tmp_path: Path, export: Export, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder(dtype=torch.float32)
    record = export(model, "--format", "huggingface", "--dtype", "bfloat16", "-o", tmp_path / "half")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "half"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name].bfloat16())
    assert record["exported"]["options"] == {"dtype": "bfloat16"}
    assert record["exported"]["verification"]["kl"] > 0


def test_the_recipe_of_another_tool_is_not_ours(
    tmp_path: Path, export: Export, tiny_decoder: Callable[..., Path]
) -> None:
    model = tiny_decoder("LlamaForCausalLM")
    (model / "recipe.yaml").write_text("default_stage: {default_modifiers: {GPTQModifier: {}}}")
    export(model, "--format", "huggingface", "--no-verify", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == f"model: {model}\nsteps: []\n"


def test_size_on_disk_is_the_promise(
    tmp_path: Path, export: Export, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder(dtype=torch.float32)
    promised = export(model, "--format", "huggingface", "--dry-run")["bytes"]
    assert not (tmp_path / "plain").exists()
    record = export(model, "--format", "huggingface", "--no-verify", "-o", tmp_path / "plain")
    there = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert record["result"]["bytes"] == there
    assert record["result"]["predicted_bytes"] == promised
    assert abs(promised - there) <= 0.02 * there
    assert record["exported"]["verification"]["not_tried"] == "--no-verify was given"
    assert "--no-verify" in (tmp_path / "plain" / "README.md").read_text()


def test_what_cannot_be_exported_leaves_nothing(
    tmp_path: Path, export: Export, shared_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_decoder(dtype=torch.float32)
    with pytest.raises(BadInput, match="did you mean 'huggingface'"):
        export(model, "--format", "hugingface", "-o", tmp_path / "plain")
    with pytest.raises(BadInput, match="holds the model to export"):
        export(model, "--format", "huggingface", "-o", model, "--overwrite")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        export(model, "--format", "huggingface", "-o", tmp_path / "full")

    interrupted = tmp_path / ".plain.partial"
    interrupted.mkdir()
    (interrupted / "run.json").write_text("{}")
    with pytest.raises(BadInput, match="interrupted run"):
        export(model, "--format", "huggingface", "-o", tmp_path / "plain")
    shutil.rmtree(interrupted)

    from compress.export import verify

    def broken(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(*tokens.shape, 257)

    monkeypatch.setattr(verify, "promised_logits", broken)
    with pytest.raises(CompressError, match="computes something else"):
        export(model, "--format", "huggingface", "-o", tmp_path / "plain")
    assert not list(tmp_path.glob("*plain*"))
