"""What ReplaceMe plans, what it refuses, and what is only just allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from compress.engine.shape import ModelShape
from compress.errors import BadInput, CompressError
from compress.pruning.parts.blocks import Block, remove_blocks
from compress.pruning.replaceme import ReplaceMe, merge
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.writer import write_weights

from .common import (
    HIDDEN,
    LAYERS,
    SMALL,
    TOKENS,
    applied,
    folder_of,
    opened,
    random_model,
    windows_of,
    written,
)


def plan(folder: Path, **options: Any) -> ModelShape:
    return ReplaceMe().plan(ModelShape.of(Checkpoint.open(folder)), ReplaceMe.Options(**options))


def test_the_plan_is_what_comes_out(folders: dict[str, Path], tmp_path: Path):
    for family in ("llama", "gpt2"):
        planned = plan(folders[family], layers=2)
        draft = applied(folders[family], tmp_path / family, layers=2).run.draft
        assert planned.config == draft.config
        assert planned.tensors == draft.tensors


def test_one_layer_must_be_left(folders: dict[str, Path]):
    assert plan(folders["llama"], layers=LAYERS - 1).num_layers == 1
    with pytest.raises(BadInput, match="at most 5 of the model's 6 layers, not 6"):
        plan(folders["llama"], layers=LAYERS)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 5, "transforms": 2},
        {"layers": 2, "transform": "least-squares", "exact": True},
        {"layers": 2, "transform": "none", "l1": 0.1},
        {"layers": 0},
        {"layers": 2, "learning_rate": 1e38},
        {"layers": 2, "held_out": 1.0},
        {"layers": 2, "ratio": 0.5},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        ReplaceMe.Options(**options)


def test_too_little_text(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="at least 16 calibration tokens"):
        applied(folders["llama"], tmp_path / "1", windows_of((5, 6, 3)), layers=2, transform="least-squares")
    ridge = {"layers": 2, "transform": "least-squares", "l2": 1.0}
    applied(folders["llama"], tmp_path / "2", windows_of((5, 6, 3)), **ridge)
    with pytest.raises(BadInput, match="none can be held out"):
        applied(folders["llama"], tmp_path / "3", windows_of((5,)), layers=2)
    applied(folders["llama"], tmp_path / "4", windows_of((5,)), layers=2, held_out=0.0)


@pytest.mark.parametrize("value", [math.nan, 1e300])
def test_a_map_that_does_not_fit_is_an_error(value: float, folders: dict[str, Path], tmp_path: Path):
    model, run, _ = opened(folders["llama"], tmp_path, windows_of())
    with pytest.raises(CompressError, match="too large or not a number"):
        merge(run.draft, model, [2], {1: torch.full((HIDDEN, HIDDEN), value, dtype=torch.float64)})


def test_a_quantized_model_is_refused(folders: dict[str, Path], tmp_path: Path):
    checkpoint = Checkpoint.open(folders["llama"])
    checkpoint.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        ReplaceMe().plan(ModelShape.of(checkpoint), ReplaceMe.Options(layers=2))


def gemma(folder: Path) -> Path:
    config = transformers.Gemma2Config(
        **SMALL,
        intermediate_size=40,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"] * 2,
        **TOKENS,
    )
    return folder_of(random_model(config), folder)


def test_a_norm_behind_the_mlp_leaves_only_plain_removal(tmp_path: Path):
    folder, windows = gemma(tmp_path / "gemma"), windows_of()
    with pytest.raises(BadInput, match=r"post_feedforward_layernorm.*transform: none"):
        plan(folder, layers=2)
    _, run, report = applied(folder, tmp_path / "step", windows, layers=2, transform="none")
    removed = report.details["cuts"][0]["removed"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    kept = [index for index in range(LAYERS) if index not in removed]
    merged = written(run.draft, tmp_path / "artefact")
    assert merged.config.layer_types == [model.config.layer_types[index] for index in kept]
    with torch.no_grad():
        for index in removed:
            model.model.layers[index].register_forward_hook(
                lambda _, inputs, output: (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
            )
        inputs = {"input_ids": windows.tokens, "attention_mask": windows.mask.long()}
        expected, logits = model(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(logits[windows.mask], expected[windows.mask], rtol=1e-5, atol=1e-5)


def test_a_post_norm_model_is_refused(tmp_path: Path):
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=40, word_embed_proj_dim=HIDDEN, do_layer_norm_before=False, **TOKENS
    )
    folder = folder_of(random_model(config), tmp_path)
    with pytest.raises(BadInput, match=r"post-norm.*transform: none"):
        plan(folder, layers=2)


def with_mlp_in(layer: int, folder: Path, work: Path) -> Path:
    """A copy of a model in which this layer alone has an MLP."""
    draft, pruned = Draft(Checkpoint.open(folder), work / "draft"), work / "pruned"
    remove_blocks(draft, [Block(index, "mlp") for index in range(LAYERS) if index != layer])
    pruned.mkdir()
    write_weights(draft, pruned)
    (pruned / "config.json").write_text(json.dumps(draft.config))
    return pruned


@pytest.mark.parametrize(("family", "transform"), [("llama", "least-squares"), ("neox", "auto")])
def test_a_map_is_folded_only_into_a_layer_with_an_mlp(
    family: str, transform: str, folders: dict[str, Path], tmp_path: Path
):
    pruned = with_mlp_in(3, folders[family], tmp_path)
    found = applied(pruned, tmp_path / "step", layers=1, transform=transform).report
    assert found.details["cuts"] == [{"layer": 3, "removed": [4]}]


@pytest.mark.parametrize(("layer", "options"), [(5, {"layers": 1}), (3, {"layers": 4, "transforms": 2})])
def test_maps_without_an_mlp_to_be_folded_into_are_refused(
    layer: int, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
):
    pruned = with_mlp_in(layer, folders["llama"], tmp_path)
    with pytest.raises(BadInput, match="too few layers with an MLP"):
        applied(pruned, tmp_path / "step", **options)
    draft = applied(pruned, tmp_path / "plain", transform="none", **options).run.draft
    assert draft.config["num_hidden_layers"] == LAYERS - options["layers"]
