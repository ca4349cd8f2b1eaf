"""The folder of a sentence encoder: it works as before, smaller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 8, "group_size": 16},
    "magnitude": {"method": "magnitude", "ratio": 0.3},
    "shortgpt": {"method": "shortgpt", "layers": 1},
}


def carry_out(step: dict[str, Any], model: Path, text: Path) -> Path:
    output, number = model.with_name("out"), {"nsamples": 4, "seqlen": 16}
    text.write_text("the cat sat on the mat . a dog ran under the tree . " * 20)
    recipe = {"model": str(model), "calibration": {"source": str(text), **number}, "steps": [step]}
    execute(parse_recipe(recipe), output)
    return output


def write_modules(folder: Path, *names: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, *({"path": name} for name in names)]))


def test_the_modules_are_carried_over(tiny_encoder: Callable[..., Path], tmp_path: Path):
    folder = tiny_encoder("BertModel")
    write_modules(folder, "1_Pooling", "2_Dense", "3_Normalize")  # a module without files has no folder
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/sub/vocab.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    weights = {"linear.weight": torch.ones(3, 32)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    for name in (
        "2_Dense/pytorch_model.bin",
        "2_Dense/module.py",
        "4_Other",
    ):  # not named, not needed, or code
        (folder / name).touch()
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).write_text("{}")

    output = carry_out(STEPS["rtn"], folder, tmp_path / "text.txt")
    there = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert {name for name in there if "_" in name and "tokenizer" not in name} == {
        *(
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/sub/vocab.txt",
            "2_Dense/model.safetensors",
        ),
        *("config_sentence_transformers.json", "sentence_bert_config.json"),
    }
    assert "modules.json" in there
    assert torch.equal(
        load_file(output / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(3, 32)
    )


@pytest.mark.parametrize("method", STEPS)
def test_sentence_transformers_loads_the_result(
    method: str, tiny_encoder: Callable[..., Path], tmp_path: Path
):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    parts = [modules.Transformer(str(tiny_encoder("BertModel"))), modules.Pooling(32, pooling_mode="cls")]
    folder, sentences = tmp_path / "encoder", ["the cat sat", "a dog ran on the mat"]
    st.SentenceTransformer(modules=[*parts, modules.Dense(32, 24), modules.Normalize()]).save(str(folder))

    output = carry_out(STEPS[method], folder, tmp_path / "text.txt")
    found = st.SentenceTransformer(str(output), trust_remote_code=method == "magnitude").encode(sentences)
    source = st.SentenceTransformer(str(folder))
    before = source.encode(sentences)
    source[0].model = compress.load(output)
    expected = source.encode(sentences)
    assert found.shape == (2, 24)
    assert np.allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, before, atol=1e-5)
    assert "library_name: sentence-transformers" in (output / "README.md").read_text()
