"""Bits by measured sensitivity, from a recipe to the model that is made of what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compress.cli import cli
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline.mixing import choose_bits
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import load_recipe, parse_recipe
from compress.pipeline.run import execute
from compress.quantization.parts import mixing
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.mixing import Mix
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint

ARCHITECTURES = ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM")
WIDTHS = [2, 3, 4, 8]
CALIBRATION = {"source": "bundled", "nsamples": 4, "seqlen": 24}


def recipe(model: Path, **options: object) -> dict:
    step = {"method": "rtn", "group_size": 32, "symmetric": False, **options}
    return {"model": str(model), "calibration": CALIBRATION, "steps": [step]}


def uniform(model: Path, bits: int) -> int:
    """Bytes of all tensors with one width for all linears."""
    (_, options) = parse_recipe(recipe(model, bits=bits, format="compressed-tensors")).steps[0]
    return plan_packed(ModelShape.of(Checkpoint.open(model)), options).nbytes


def mix(model: Path, memory: int, widths: list[int] = WIDTHS, **options: object) -> Mix:
    with TemporaryDirectory() as folder:
        return choose_bits(parse_recipe(recipe(model, **options)), widths, memory, Path(folder))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_a_recipe_to_a_model_that_fits(
    tiny_decoder: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    model = tiny_decoder(architecture)
    before, after, folder = tmp_path / "recipe.yaml", tmp_path / "mixed.yaml", tmp_path / "out"
    before.write_text(yaml.safe_dump(recipe(model)))
    memory = (uniform(model, 3) + uniform(model, 4)) // 2
    there = set(tmp_path.iterdir())
    arguments = ["mix", str(before), "--memory", str(memory), "-o", str(after), "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    told = json.loads(result.stdout)
    assert set(tmp_path.iterdir()) == {*there, after}
    assert execute(load_recipe(after), folder).result.bytes == told["bytes"]
    assert 0.95 * memory < told["bytes"] <= memory
    packed = Checkpoint.open(folder)
    for name, bits in told["bits"].items():
        out, width = packed.read(f"{name}.weight_shape").tolist()
        assert packed.tensors[f"{name}.weight_packed"].shape == (out, width * bits // 32)


def test_more_memory_lowers_the_expected_loss(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder()
    sizes = {bits: uniform(model, bits) for bits in WIDTHS}
    found = [mix(model, memory) for memory in (sizes[2], sizes[3], sizes[4], sizes[8])]
    assert set(found[0].bits.values()) == {2}
    assert set(found[3].bits.values()) == {8}
    losses = [each.loss for each in found]
    assert losses == sorted(losses, reverse=True)
    for bits, each in zip(WIDTHS, found, strict=True):  # no worse than the same width everywhere
        assert each.loss <= mix(model, sizes[bits], [bits]).loss
        assert each.nbytes <= sizes[bits]


def test_methods_that_look_at_text_are_trusted_to_spare_the_channels_that_matter(
    tiny_decoder: Callable[..., Path],
) -> None:
    model = tiny_decoder()
    tensors = load_file(model / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][3] *= 30
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][5] *= 30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    memory = uniform(model, 3)
    plain, free, aware = (mix(model, memory, [3], method=name) for name in ("rtn", "hqq", "awq"))
    assert free.loss == plain.loss
    assert aware.loss < 0.8 * plain.loss
    assert mix(model, memory, method="awq").bits != mix(model, memory).bits


def test_what_the_output_does_not_depend_on_gets_the_fewest_bits(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = mix(model, uniform(model, 4))
    for name in ("q", "k", "v"):
        assert found.bits[f"model.layers.0.self_attn.{name}_proj"] == 2
        assert found.bits[f"model.layers.1.self_attn.{name}_proj"] > 2


def test_ignored_linears_and_packed_tables_are_reckoned_with(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder()
    found = mix(model, uniform(model, 8), ignore=["*.down_proj"], embedding_bits=8, lm_head_bits=8)
    assert not [name for name in found.bits if name.endswith("down_proj")]
    assert found.nbytes <= uniform(model, 8)
    assert (found.options.ignore, found.options.embedding_bits) == (["*.down_proj"], 8)


@pytest.mark.parametrize(
    ("step", "widths", "said"),
    [
        ({"method": "rtn", "set": {"*.v_proj": 8}}, WIDTHS, "leave the option out"),
        ({"method": "rtn"}, [3, 9], "bits: Input should be 2, 3, 4, 5, 6, 7 or 8"),
        ({"method": "float"}, WIDTHS, "takes bits and a group size"),
    ],
)
def test_what_cannot_be_mixed(
    tiny_decoder: Callable[..., Path], tmp_path: Path, step: dict, widths: list[int], said: str
) -> None:
    data = recipe(tiny_decoder()) | {"steps": [step]}
    with pytest.raises(BadInput, match=said):
        choose_bits(parse_recipe(data), widths, 10**9, tmp_path)


def test_too_little_memory_and_a_file_that_exists(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_decoder()
    with pytest.raises(BadInput, match="At 2 bits everywhere the model takes"):
        mix(model, uniform(model, 2) - 1)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(model)))
    result = CliRunner().invoke(cli, ["mix", str(file), "--memory", "1MB", "-o", str(file)])
    assert "exists already" in str(result.exception)
    assert yaml.safe_load(file.read_text()) == recipe(model)


@pytest.mark.parametrize("name", ["rtn", "awq"])
def test_a_step_mixes_bits_in_the_bytes_of_uniform_ones(
    shared_decoder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model = shared_decoder()
    step = {"method": name, "bits": 4, "group_size": 32, "mix": True}
    wanted = parse_recipe({"model": str(model), "calibration": CALIBRATION, "steps": [step]})
    lineage = execute(wanted, tmp_path / "out")
    result, options = lineage.result, lineage.steps[0].options
    assert lineage.calibration is not None  # also of a method that looks at no text itself
    assert 0.9 * result.predicted_bytes < result.bytes <= result.predicted_bytes
    assert len({options["bits"], *options["set"].values()}) > 1
    # What was chosen is in the lineage in full, so that it can be made again without measuring.
    again = parse_recipe({**wanted.resolved(), "steps": [{"method": name, **options}]})
    assert execute(again, tmp_path / "again").result.files == result.files


def test_a_mixed_step_goes_on_with_the_bits_it_chose(
    shared_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"method": "rtn", "group_size": 32, "mix": True}
    wanted = parse_recipe({"model": str(shared_decoder()), "calibration": CALIBRATION, "steps": [step]})
    whole = execute(wanted, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RoundToNearest, "apply", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            execute(wanted, tmp_path / "out")
    monkeypatch.setattr(mixing, "mix", Mock(side_effect=AssertionError("measured twice")))
    assert execute(wanted, tmp_path / "out").result.files == whole.result.files


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"set": {"*": 3}}, "mix chooses the bits of every linear; leave out set"),
        ({"format": "gptq"}, "the format gptq has one width for all linears"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_the_work(options: dict, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        parse_recipe({"model": "m", "steps": [{"method": "rtn", "mix": True, **options}]})


def test_low_bits_are_planned_in_the_format_that_mixed_ones_have(
    shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    model = shared_decoder("GPTNeoXForCausalLM")
    step = {"method": "hqq", "bits": 3, "group_size": 32, "mix": True}
    wanted = parse_recipe({"model": str(model), "calibration": CALIBRATION, "steps": [step]})
    planned = make_plan(Checkpoint.open(model), wanted.steps).after
    result = execute(wanted, tmp_path / "out").result
    assert result.loads_with == str(planned.loads_with) == "transformers with compressed-tensors"
    assert result.bytes <= planned.nbytes
