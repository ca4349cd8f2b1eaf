"""Types of GGUF by measured sensitivity, from a recipe to the file that is made of what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from gguf import GGUFReader

from compress.cli import cli
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.gguf import TYPES
from compress.quantization.parts import choices
from compress.quantization.parts.gguf_ladder import GGUFLadder
from compress.storage.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def few_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "SWAPS", 2)


def recipe(model: Path, folder: Path) -> Path:
    calibration = {"source": "bundled", "nsamples": 4, "seqlen": 24}
    document = {"model": str(model), "calibration": calibration, "steps": [{"method": "rtn"}]}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "intermediate_size": 256}),
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("GPT2LMHeadModel", {}),
        ("GPTNeoXForCausalLM", {"tie_word_embeddings": True}),
    ],
)
def test_from_a_recipe_to_a_file_that_is_no_larger(
    tiny_decoder: Callable[..., Path], tmp_path: Path, architecture: str, settings: dict
) -> None:
    model = tiny_decoder(architecture, **settings)
    ladder = GGUFLadder(ModelShape.of(Checkpoint.open(model)), None, tmp_path / "blocks")
    smallest, largest = (
        ladder.fixed + sum(pick(sizes.values()) for sizes in ladder.sizes.values()) for pick in (min, max)
    )
    types, file = tmp_path / "types.json", tmp_path / "model.gguf"
    memory = (smallest + largest) // 2
    told = run("mix", recipe(model, tmp_path), "--memory", memory, "--format", "gguf", "-o", types)
    assert told["bytes"] <= memory
    run("export", model, "--format", "gguf", "--types", types, "-o", file, "--no-verify")
    # Types differ by tens of bytes here; metadata is reckoned with a margin.
    assert 0.7 * memory < file.stat().st_size <= told["bytes"]
    wanted = json.loads(types.read_text())
    there = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert {name: there[name] for name in wanted} == wanted == told["types_in_file"]
    assert {kind for name, kind in there.items() if name not in wanted} <= {"F32"}
    assert "token_embd.weight" in wanted
    assert len(set(wanted.values())) > 1


def test_types_fit_the_rows_and_cost_what_they_cost_in_the_file(
    shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    shape = ModelShape.of(Checkpoint.open(shared_decoder(intermediate_size=256)))
    ladder = GGUFLadder(shape, None, tmp_path)
    down, up = (ladder.sizes[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "up"))
    assert set(down) == {name for name, kind in TYPES.items() if kind.dtype is None}
    assert set(up) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
    assert down["Q4_K"] == 64 * 144
    assert up["Q8_0"] == 256 * 64 // 32 * 34
    narrow = GGUFLadder(shape, ["q4_k"], tmp_path)
    assert narrow.sizes["model.layers.0.mlp.down_proj"] == {"Q4_K": 64 * 144}
    assert set(narrow.sizes["model.layers.0.mlp.up_proj"]) == {"F16"}  # nothing else fits


def test_more_important_channels_are_rounded_better(
    shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    ladder = GGUFLadder(ModelShape.of(Checkpoint.open(shared_decoder())), None, tmp_path)
    name, dense = "model.layers.0.self_attn.q_proj", torch.randn(64, 64)
    importance = torch.where(torch.arange(64) % 8 == 0, 10.0, 1.0)
    (power,) = ladder.powers(name)
    aware = ladder.rounded(name, dense, "Q4_0", importance, power)
    again = ladder.rounded(name, torch.zeros(64, 64), "Q4_0", importance, power)
    assert torch.equal(aware, again)  # it was kept
    plain = GGUFLadder(ladder.shape, None, tmp_path / "other").rounded(name, dense, "Q4_0", None, 0.0)
    errors = [(each - dense)[:, importance > 1].norm() for each in (aware, plain)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "1MB", "--types", "Q9_K"], "Q9_K"),
        (["--bits", "1"], "In the smallest types the model takes"),
    ],
)
def test_what_cannot_be_had(
    shared_decoder: Callable[..., Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = recipe(shared_decoder(), tmp_path)
    wanted = ["mix", str(file), *arguments, "--format", "gguf", "-o", str(tmp_path / "types.json")]
    result = CliRunner().invoke(cli, wanted)
    assert isinstance(result.exception, BadInput)
    assert said in str(result.exception)
    assert not (tmp_path / "types.json").exists()
