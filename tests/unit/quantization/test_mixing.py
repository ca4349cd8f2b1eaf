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

from compress.calibration.text.prepare import prepare_calibration
from compress.cli import cli
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline import mixing as pipeline_mixing
from compress.pipeline.mixing import COMPRESSED_TENSORS, MLX, OURS, Budget, Chosen, choose_types
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import load_recipe, parse_recipe
from compress.pipeline.run import execute
from compress.quantization.parts import choices
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.mixing import split
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint

TYPES = ["2", "3", "4", "8"]
CALIBRATION = {"source": "bundled", "nsamples": 4, "seqlen": 24}


def recipe(model: Path, **options: object) -> dict:
    step = {"method": "rtn", "group_size": 32, "symmetric": False, **options}
    return {"model": str(model), "calibration": CALIBRATION, "steps": [step]}


def uniform(model: Path, bits: int, **options: object) -> int:
    """Bytes of all tensors with one width for everything."""
    shape = ModelShape.of(Checkpoint.open(model))
    tables = {"embedding_bits": bits} | ({} if shape.anatomy.tied else {"lm_head_bits": bits})
    (_, wanted) = parse_recipe(recipe(model, bits=bits, **tables, **options)).steps[0]
    return plan_packed(shape, wanted).nbytes


def mix(
    model: Path, memory: int, types: list[str] | None = TYPES, target: str = OURS, **options: object
) -> Chosen:
    with TemporaryDirectory() as folder:
        wanted = parse_recipe(recipe(model, **options))
        return choose_types(wanted, target, types, Budget(nbytes=memory), Path(folder))


def mixed_by_command(before: Path, after: Path, *arguments: str) -> dict:
    """What ``mix`` tells of a new recipe, as JSON."""
    wanted = ["mix", str(before), *arguments, "-o", str(after), "--json"]
    return json.loads(CliRunner().invoke(cli, wanted, catch_exceptions=False).stdout)


@pytest.fixture(autouse=True)
def few_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three swaps are enough to see that they are tried."""
    monkeypatch.setattr(choices, "SWAPS", 3)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("LlamaForCausalLM", True), ("GPT2LMHeadModel", True), ("OPTForCausalLM", False)],
)
def test_from_a_recipe_to_a_model_that_fits(
    tiny_decoder: Callable[..., Path], tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny_decoder(architecture, tie_word_embeddings=tied)
    before, after, folder = tmp_path / "recipe.yaml", tmp_path / "mixed.yaml", tmp_path / "out"
    before.write_text(yaml.safe_dump(recipe(model)))
    memory = (uniform(model, 3) + uniform(model, 4)) // 2
    there = set(tmp_path.iterdir())
    told = mixed_by_command(before, after, "--memory", str(memory))
    assert set(tmp_path.iterdir()) == {*there, after}
    assert execute(load_recipe(after), folder).result.bytes == told["bytes"]
    assert 0.95 * memory < told["bytes"] <= memory
    packed = Checkpoint.open(folder)
    table = ModelShape.of(packed).anatomy.in_model(ModelShape.of(packed).anatomy.embeddings[0])
    assert table in told["types"]
    assert ("lm_head" in told["types"]) is not tied
    for name, bits in told["types"].items():
        out, width = packed.read(f"{name}.weight_shape").tolist()
        assert packed.tensors[f"{name}.weight_packed"].shape == (out, -(-width * int(bits) // 32))


def test_more_memory_lowers_the_predicted_loss(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder()
    sizes = {bits: uniform(model, int(bits)) for bits in TYPES}
    found = [mix(model, memory).mix for memory in sizes.values()]
    assert set(found[0].kinds.values()) == {"2"}
    assert set(found[-1].kinds.values()) == {"8"}
    distances = [each.measured for each in found]
    assert distances == sorted(distances, reverse=True)
    assert all(each.nbytes <= size for each, size in zip(found, sizes.values(), strict=True))
    # No worse than the same width everywhere.
    assert found[1].measured <= mix(model, sizes["3"], ["3"]).mix.measured


def test_what_is_measured_is_the_divergence_of_the_model_that_is_made(
    tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    """Plain rounding makes exactly the weights that choices are compared with."""
    model = tiny_decoder()
    chosen = mix(model, uniform(model, 3), method="rtn")
    execute(chosen.recipe, tmp_path / "out")
    dense = Checkpoint.open(model)
    windows = prepare_calibration(chosen.recipe.calibration, 0, dense, "cpu", lambda text, share: None)
    (_, held_out) = split(windows, decoder=True)
    p, q = (
        streamed_logits(each, held_out).double().log_softmax(-1)
        for each in (dense, Checkpoint.open(tmp_path / "out"))
    )
    expected = (p.exp() * (p - q)).sum(-1)[held_out.mask].mean()
    assert chosen.mix.measured == pytest.approx(float(expected), rel=1e-3)


def test_corrections_are_no_worse_than_the_first_choice(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is blind to what it was not measured on; the measurement on held-out text is not."""
    model = tiny_decoder()
    memory = uniform(model, 3)
    corrected = mix(model, memory).mix
    assert corrected.tried > 1
    monkeypatch.setattr(choices, "SWAPS", 0)
    monkeypatch.setattr(choices.Corrections, "_correct", lambda *_: None)
    first = mix(model, memory).mix
    assert first.tried == 1
    assert corrected.measured <= first.measured


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
    plain, free, aware = (mix(model, memory, ["3"], method=name).mix for name in ("rtn", "hqq", "awq"))
    assert free.predicted == plain.predicted
    assert aware.predicted < 0.8 * plain.predicted
    assert mix(model, memory, method="awq").mix.kinds != mix(model, memory).mix.kinds


def test_what_the_output_does_not_depend_on_gets_the_fewest_bits(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = mix(model, uniform(model, 4)).mix
    for name in ("q", "k", "v"):
        assert found.kinds[f"model.layers.0.self_attn.{name}_proj"] == "2"
        assert found.kinds[f"model.layers.1.self_attn.{name}_proj"] != "2"


def test_ignored_linears_are_reckoned_with(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder(tie_word_embeddings=False)
    memory = 3 * uniform(model, 8) // 2
    chosen = mix(model, memory, ignore=["*.down_proj", "lm_head"], embedding_bits=3)
    assert not [name for name in chosen.mix.kinds if name.endswith("down_proj") or name == "lm_head"]
    assert chosen.mix.nbytes <= memory
    options = chosen.recipe.steps[0][1]
    assert options.ignore == ["*.down_proj", "lm_head"]
    assert options.embedding_bits == int(chosen.mix.kinds["model.embed_tokens"])
    assert options.lm_head_bits is None


def test_a_tied_table_stays_as_it_is_where_its_head_is_ignored(tiny_decoder: Callable[..., Path]) -> None:
    model = tiny_decoder(tie_word_embeddings=True)
    chosen = mix(model, 10**9, ignore=["lm_head"])
    assert "model.embed_tokens" not in chosen.mix.kinds
    assert chosen.recipe.steps[0][1].embedding_bits is None


def test_a_table_that_files_hold_twice_is_measured_as_embedding_and_head(
    tiny_decoder: Callable[..., Path],
) -> None:
    once = tiny_decoder(tie_word_embeddings=True)
    twice = tiny_decoder(name="twice", tie_word_embeddings=True)
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    one, other = (mix(model, 10**9, ["2"]).mix for model in (once, twice))
    assert other.measured == one.measured


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_mixed_for_compressed_tensors_loads_there(
    tiny_decoder: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    model = tiny_decoder(tie_word_embeddings=tied)
    memory = 3 * uniform(model, 8) // 2
    chosen = mix(model, memory, target=COMPRESSED_TENSORS, symmetric=None, embedding_bits=8)
    assert ("lm_head" in chosen.mix.kinds) is not tied
    assert "model.embed_tokens" not in chosen.mix.kinds
    result = execute(chosen.recipe, tmp_path / "out").result
    assert result.loads_with == chosen.loads_with == "transformers with compressed-tensors"
    assert result.bytes == chosen.mix.nbytes <= memory
    with pytest.raises(BadInput, match="only if they are symmetric"):
        mix(model, memory, target=COMPRESSED_TENSORS)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_mixed_for_mlx_is_as_small_as_asked_there(
    tiny_decoder: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    model = tiny_decoder(tie_word_embeddings=tied)
    memory = uniform(model, 5)
    chosen = mix(model, memory, None, MLX, **({"group_size": "auto"} if tied else {}))
    assert "mlx-lm" in chosen.loads_with
    execute(chosen.recipe, tmp_path / "out")
    done = CliRunner().invoke(
        cli, ["export", str(tmp_path / "out"), "--format", "mlx", "-o", str(tmp_path / "mlx"), "--no-verify"]
    )
    assert done.exit_code == 0, done.output
    written = Checkpoint.open(tmp_path / "mlx").nbytes
    assert written == chosen.mix.nbytes <= memory
    assert set(chosen.mix.kinds.values()) <= {"2", "3", "4", "5", "6", "8"}


def test_what_mlx_lacks_is_refused_before_anything_is_measured(
    tiny_decoder: Callable[..., Path],
) -> None:
    model = tiny_decoder()
    for types, options in ((["4", "7"], {}), (None, {"group_size": 16})):
        with pytest.raises(BadInput, match="mlx has codes of 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128"):
            mix(model, 10**9, types, MLX, **options)
    with pytest.raises(BadInput, match=r"--set steps\.0\.group_size=32"):
        mix(model, 10**9, None, MLX, group_size="channel")
    with pytest.raises(BadInput, match="groups of 32, 64 or 128 values, not of 16"):
        mix(tiny_decoder(name="narrow", intermediate_size=80), 10**9, None, MLX, group_size="auto")
    with pytest.raises(BadInput, match="mlx-lm has no gpt2 models"):
        mix(tiny_decoder("GPT2LMHeadModel", "other"), 10**9, None, MLX)


def test_the_size_of_a_file_and_bits_per_parameter(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_decoder()
    before, like = tmp_path / "recipe.yaml", tmp_path / "like.gguf"
    before.write_text(yaml.safe_dump(recipe(model)))
    like.write_bytes(bytes((uniform(model, 3) + uniform(model, 8)) // 2))
    told = mixed_by_command(before, tmp_path / "like.yaml", "--memory", str(like), "--types", "2,3,4,8")
    execute(load_recipe(tmp_path / "like.yaml"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert told["bytes"] < file.stat().st_size <= like.stat().st_size

    parameters = ModelShape.of(Checkpoint.open(model)).parameters
    bits = 8 * uniform(model, 3) / parameters
    told = mixed_by_command(before, tmp_path / "bits.yaml", "--bits", f"{bits + 0.01:.2f}")
    assert 0.9 * uniform(model, 3) < told["bytes"] <= (bits + 0.02) * parameters / 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --memory or --bits"),
        (["--memory", "1MB", "--bits", "3"], "either --memory or --bits"),
        (["--bits", "-1"], "is not a number of bits per parameter"),
        (["--bits", "nan"], "is not a number of bits per parameter"),
        (["--memory", "nosuch.gguf"], "is not an amount of memory"),
        (["--memory", "nosuch/file"], "is not a file whose size"),
        (["--memory", "1MB", "--types", "3,nine"], "no codes of type 'nine'"),
        (["--memory", "1MB", "--types", "9"], "no codes of type '9'"),
    ],
)
def test_sizes_and_types_that_are_none(
    shared_decoder: Callable[..., Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(shared_decoder())))
    result = CliRunner().invoke(cli, ["mix", str(file), *arguments, "-o", str(tmp_path / "new.yaml")])
    assert isinstance(result.exception, BadInput)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"method": "rtn", "set": {"*.v_proj": 8}}, "leave the option out"),
        ({"method": "float"}, "takes bits and a group size"),
    ],
)
def test_what_cannot_be_mixed(
    shared_decoder: Callable[..., Path], tmp_path: Path, step: dict, said: str
) -> None:
    data = recipe(shared_decoder()) | {"steps": [step]}
    with pytest.raises(BadInput, match=said):
        choose_types(parse_recipe(data), OURS, TYPES, Budget(nbytes=10**9), tmp_path)


def test_too_little_memory_and_a_file_that_exists(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_decoder()
    assert mix(model, uniform(model, 2)).mix.nbytes == uniform(model, 2)
    with pytest.raises(BadInput, match="In the smallest types the model takes"):
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
    monkeypatch.setattr(pipeline_mixing, "mix", Mock(side_effect=AssertionError("measured twice")))
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
