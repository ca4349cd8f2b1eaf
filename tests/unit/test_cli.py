"""The command line as its users meet it: what it prints where, and with which exit code it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import compress.evaluate
import compress.recipe
from compress import registry
from compress.artefact import read_lineage
from compress.cli import COMMANDS, main
from compress.commands.common import make_table, stdout
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.models import ModelSource, find_model
from compress.recipe import parse_recipe
from compress.registry import METHODS
from compress.run import execute
from compress.scorecard import Scorecard

RTN = ["--method", "rtn", "--group-size", "32"]
GPTQ = ["--method", "gptq", "--group-size", "32"]
FLAP = ["--method", "flap", "--ratio", "0.2"]
FEW_TOKENS = ["--nsamples", "1", "--seqlen", "32"]
REPLACEME = ["--method", "replaceme", "--layers", "1", "--nsamples", "4", "--seqlen", "32", "--epochs", "1"]
SCORING = ["--context", "64", "--windows", "2"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, through its real way in, and puts the process back as it was."""

    def run(*words: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["compress-model", *map(str, words)])
        root, ours = logging.getLogger(), logging.getLogger("compress")
        handlers, levels = root.handlers[:], (root.level, ours.level)
        capsys.readouterr()
        try:
            with mock.patch.dict(os.environ), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
                main()
        finally:
            root.handlers[:] = handlers
            root.setLevel(levels[0])
            ours.setLevel(levels[1])
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def process(*words: Any, **environment: str) -> Ended:
    """Runs a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def tiny(write_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_decoder(folder, num_hidden_layers=4, max_position_embeddings=128)


@pytest.fixture(scope="module")
def quantized(tiny: Path) -> Path:
    folder = tiny.with_name("quantized")
    execute(parse_recipe({"model": str(tiny), "steps": [{"method": "rtn", "group_size": 32}]}), folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps that fit the tiny model."""
    path = tmp_path / "recipe.yaml"
    steps = [
        {"method": "replaceme", "layers": 1, "transform": "none"},
        {"method": "rtn", "group_size": 32},
    ]
    path.write_text(yaml.safe_dump({"calibration": {"nsamples": 2, "seqlen": 16}, "steps": steps}))
    return path


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_one_sentence(ended: Ended, code: int, words: str) -> None:
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("Error: ")
    assert ended.err.rstrip().endswith((".", "?"))
    assert not ended.err.rstrip().endswith("?.")
    assert words in ended.err


# --- help, names, completion


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, command: Command):
    ended = command(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"compress-model {name}" in ended.out
    for option in ("--json", "--verbose", "--quiet", "--debug"):
        assert option in ended.out


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import compress", ["torch", "transformers", "pydantic", "click", "yaml"]),
        (
            "import sys; sys.argv = ['compress-model', '--help']; from compress.cli import main; main()",
            ["torch", "transformers", "pydantic", "numpy", "yaml", "compress.commands"],
        ),
    ],
)
def test_the_start_imports_nothing_heavy(statement: str, heavy: list[str]):
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('HEAVY', set({heavy}) & sys.modules.keys()))\n"
        f"{statement}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY set()"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["prunee"], "no command 'prunee'; did you mean 'prune'"),
        (["prune", "m", "--metod", "replaceme"], "no option '--metod'; did you mean '--method'"),
        (["prune", "m", *REPLACEME, "--distanc", "x"], "no option '--distanc'; did you mean '--distance'"),
        (["prune", "m", "--xyzzy"], "no option '--xyzzy'; see 'compress-model prune --help'"),
        (["prune", "m", "--method", "replaceMe"], "no method 'replaceMe'; did you mean 'replaceme'"),
        (["prune", "m", "--method", "rtn"], "'rtn' is a method of quantization, not of pruning"),
        (["methods", "rtm"], "no method 'rtm'; did you mean 'rtn'"),
        (["recipes", "int5"], "no recipe 'int5'; did you mean 'int4'"),
        (["run", "int5"], "no recipe 'int5'; did you mean 'int4'"),
    ],
)
def test_the_nearest_name_is_suggested(words: list[str], sentence: str, command: Command):
    assert_one_sentence(command(*words), 2, sentence)


def test_help_of_a_method_lists_its_options_and_defaults(command: Command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = command("prune", "MODEL", "--method", "replaceme", "--help").out
    assert "\\" not in shown
    for line in shown.splitlines():
        if "--layers " in line:
            assert "[required]" in line
        if "--epochs" in line:
            assert "[default: 10]" in line
        if "--exact/--no-exact" in line:
            assert "[default: false]" in line
    for option in ("--layers", "--epochs", "--exact/--no-exact", "[cosine|least-squares|none]", "--nsamples"):
        assert option in shown
    assert "--layers" not in command("prune", "--help").out
    assert "--order-from" in command("prune", "MODEL", "--method", "blockpruner", "--help").out


def test_completion(command: Command, monkeypatch):
    monkeypatch.setenv("_COMPRESS_MODEL_COMPLETE", "bash_source")
    assert "complete -o nosort -F" in command().out
    monkeypatch.setenv("_COMPRESS_MODEL_COMPLETE", "bash_complete")
    for typed, offered in [
        ("qu", ["quantize"]),
        ("quantize --me", ["--method"]),
        ("quantize m --method ", list(METHODS["quantization"])),
        ("quantize m --method r", ["rtn"]),
        ("quantize m --method rtn --group", ["--group-size"]),
        ("quantize m --method nosuch --dev", ["--device"]),
    ]:
        monkeypatch.setenv("COMP_WORDS", f"compress-model {typed}")
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) + typed.endswith(" ")))
        assert command().out.splitlines() == [f"plain,{name}" for name in offered], typed


# --- what is printed


def test_json_is_one_document(command: Command, tiny: Path, recipe: Path, quantized: Path, tmp_path: Path):
    assert {"rtn", "replaceme"} <= {found["name"] for found in command("methods", "--json").document}
    assert command("methods", "rtn", "--json").document[0]["needs_calibration"] is False
    assert "int4" in command("recipes", "--json").document
    assert command("recipes", "int4", "--json").document["int4"].startswith("#")
    assert "torch" in command("doctor", "--json").document["packages"]
    assert command("plan", tiny, recipe, "--json").document["after"]["layers"] == 3
    assert command("inspect", tiny, "--json").document["lineage"] is None
    assert command("run", recipe, "-m", tiny, "--dry-run", "--json").document["after"]["layers"] == 3
    for words in (["prune", tiny, *REPLACEME], ["quantize", tiny, *RTN], ["run", recipe, "-m", tiny]):
        ended = command(*words, "-o", tmp_path / words[0], "--json")
        assert ended.code == 0, ended.err
        assert ended.document == json.loads((tmp_path / words[0] / "compression.json").read_text())


def test_libraries_are_silent_and_v_lets_them_speak(command: Command, tiny: Path, tmp_path: Path):
    quiet = process("prune", tiny, *REPLACEME, "-o", tmp_path / "quiet", "-q")
    assert (quiet.code, quiet.err) == (0, "")
    assert "MB of weights" in quiet.out
    assert "Loading weights" in command("prune", tiny, *REPLACEME, "-o", tmp_path / "v", "-v").err


def test_progress_is_plain_lines_on_stderr(command: Command, tiny: Path, tmp_path: Path):
    ended = command("quantize", tiny, *RTN, "-o", tmp_path / "out")
    assert "rounding to 4 bits: 100%\n" in ended.err
    assert "\x1b" not in ended.err + ended.out
    assert "rounding" not in ended.out


def test_sentences_are_not_wrapped_and_tables_are_not_cut(command: Command, quantized: Path, capsys):
    lines = command("inspect", quantized).out.splitlines()
    assert any(line.startswith("  rtn (") and line.endswith("at most") for line in lines)
    assert "…" not in command("methods").out
    assert "replaceme" in command("methods").out
    table = make_table("name", "value")
    long = "".join(f"{number:04d}" for number in range(200))
    table.add_row("[bold]:smile:", long)
    stdout().print(table)
    shown = capsys.readouterr().out
    assert "[bold]:smile:" in shown
    assert long in "".join(character for character in shown if character.isdigit())


def test_recipes_are_shown_and_copied(command: Command, tmp_path: Path):
    text = command("recipes", "int4").out
    assert yaml.safe_load(text)["steps"][0]["bits"] == 4
    assert "int4 " in command("recipes").out
    assert command("recipes", "int4", "--copy", tmp_path / "mine.yaml") == Ended(0, "", "")
    assert (tmp_path / "mine.yaml").read_text() == text
    assert_one_sentence(command("recipes", "int4", "--copy", tmp_path / "mine.yaml"), 2, "exists already")
    assert_one_sentence(command("recipes", "int4", "--copy", tmp_path), 2, "is a folder")
    assert_one_sentence(command("recipes", "int4", "--copy", tmp_path / "no" / "x"), 2, "There is no folder")


# --- dry runs, plans, inspection


def test_a_dry_run_writes_nothing(command: Command, tiny: Path, recipe: Path, tmp_path: Path):
    before = listing(tmp_path) | listing(tiny.parent)
    for words in (["prune", tiny, *REPLACEME], ["quantize", tiny, *RTN], ["run", recipe, "-m", tiny]):
        ended = command(*words, "-o", tmp_path / "out", "--dry-run")
        assert (ended.code, ended.err) == (0, "")
        assert "bits/parameter" in ended.out
    assert listing(tmp_path) | listing(tiny.parent) == before


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors in the files: all but the headers."""
    data = [file.read_bytes() for file in folder.glob("*.safetensors")]
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in data)


def rtn(form: str, bits: int, group_size: int | str, symmetric: bool, **more: Any) -> dict[str, Any]:
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "format": form, **more}
    return {"method": "rtn", **settings}


# Each with both dtypes where that changes what is stored: dense tensors, and scales in every format.
@pytest.mark.parametrize(
    ("steps", "dtypes"),
    [
        ([], ["float32", "bfloat16"]),
        ([{"method": "replaceme", "layers": 2, "transform": "least-squares"}], ["float32", "bfloat16"]),
        ([rtn("compressed-tensors", 4, 32, True)], ["bfloat16"]),
        ([rtn("compressed-tensors", 8, "channel", False)], ["float32"]),
        ([rtn("gptq", 2, 32, False)], ["float32", "bfloat16"]),
        ([rtn("gptq", 3, 32, True)], ["float32"]),
        ([rtn("gptq", 4, 16, True)], ["bfloat16"]),
        ([rtn("gptq", 8, 32, False)], ["float32"]),
        (
            [{"method": "replaceme", "layers": 1, "transform": "none"}, {"method": "rtn", "group_size": 32}],
            ["bfloat16"],
        ),
        (
            [
                {"method": "replaceme", "layers": 1, "epochs": 1},
                {"method": "rtn", "bits": 3, "group_size": 32, "ignore": ["model.layers.0.*"]},
            ],
            ["float32"],
        ),
        (
            [{"method": "flap", "ratio": 0.3, "structure": "UL-MM", "compensate": "bias"}],
            ["float32", "bfloat16"],
        ),
        (
            [
                {"method": "flap", "ratio": 0.3, "shape": "uniform", "width_multiple": 16},
                {"method": "rtn", "group_size": 16},
            ],
            ["float32"],
        ),
        ([{"method": "wanda-sp", "ratio": 0.2}], ["bfloat16"]),
        ([{"method": "magnitude", "ratio": 0.2}], ["float32"]),
        (
            [rtn("auto", 3, 32, True, set={"*.v_proj": 8}, lm_head_bits=8, embedding_bits=4)],
            ["float32", "bfloat16"],
        ),
    ],
)
def test_the_plan_is_what_is_written(
    steps: list[dict[str, Any]], dtypes: list[str], command: Command, tiny: Path, tmp_path: Path
):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"calibration": {"nsamples": 8, "seqlen": 16}, "steps": steps}))
    for dtype in dtypes:
        check_plan(path, steps, dtype, command, tiny, tmp_path / dtype)


def check_plan(
    path: Path, steps: list[dict[str, Any]], dtype: str, command: Command, tiny: Path, output: Path
) -> None:
    plan = command("plan", tiny, path, "--dtype", dtype, "--json").document
    ended = command("run", path, "-m", tiny, "--dtype", dtype, "-o", output, "-q")
    assert ended.code == 0, ended.err
    found = command("inspect", output, "--json").document
    assert plan["after"]["bytes"] == stored_bytes(output) == found["bytes"]
    assert plan["after"]["layers"] == found["sizes"]["num_hidden_layers"]
    for key in ("parameters", "bits_per_parameter", "loads_with"):
        assert plan["after"][key] == found[key]
    assert [step["method"] for step in plan["steps"]] == [step["method"] for step in steps]
    assert sum(found["bytes_per_part"].values()) == found["bytes"] == sum(found["dtypes"].values())


def test_inspect_tells_what_a_folder_is(command: Command, tiny: Path, quantized: Path, tmp_path: Path):
    dense = command("inspect", tiny)
    assert "llama, loads with transformers\n" in dense.out
    assert "did not write this folder" in dense.out
    packed = command("inspect", quantized, "--json").document
    assert packed["lineage"]["steps"][0]["method"] == "rtn"
    assert packed["bytes_per_part"]["attention"] < packed["bytes_per_part"]["mlp"]
    assert {"I32", "F32"} <= packed["dtypes"].keys()
    assert command("prune", tiny, *REPLACEME, "-o", tmp_path / "pruned", "-q").code == 0
    shown = command("inspect", tmp_path / "pruned").out
    assert "num_hidden_layers 3" in shown
    assert "  replaceme (layers=1" in shown


def test_an_order_of_removal_is_used_again(command: Command, tiny: Path, tmp_path: Path):
    search = ["prune", tiny, "--method", "blockpruner", "--nsamples", "2", "--seqlen", "16", "-q"]
    whole, fewer = tmp_path / "whole", tmp_path / "fewer"
    assert command(*search, "--blocks", "3", "-o", whole).code == 0
    assert command(*search, "--blocks", "1", "--order-from", whole, "-o", fewer).code == 0
    long, short = (read_lineage(folder).steps[0] for folder in (whole, fewer))
    assert len(long.details["removed"]) == 3
    assert short.details["removed"] == long.details["removed"][:1]
    removed = long.details["removed"][0]
    assert f"{removed['before']:.2f} before, {removed['perplexity']:.2f} after" in short.summary
    assert read_lineage(fewer).reload.loaded_by == "transformers"
    words = [*search, "--blocks", "1", "--mode", "mlp", "--order-from", whole, "-o", tmp_path / "x"]
    assert_one_sentence(command(*words), 2, "was found with another mode; search again")
    assert not (tmp_path / "x").exists()


# --- what goes wrong


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def with_weight(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name][3, 4] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


UP = "model.layers.2.mlp.up_proj.weight"


def adapter(folder: Path) -> None:
    """What peft writes."""
    for file in folder.iterdir():
        file.unlink()
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny"}')


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def another(model_type: str) -> Callable[[Path], None]:
    """Of one layer, so that no method can be first to complain that there are too few."""
    changes = {"model_type": model_type, "num_hidden_layers": 1}
    return lambda folder: rewrite(folder, lambda config: config.update(changes))


@pytest.mark.parametrize("words", [["prune", *REPLACEME], ["quantize", *RTN]], ids=["prune", "quantize"])
@pytest.mark.parametrize(
    ("breakage", "sentence"),
    [
        (not_json, "config.json is not JSON"),
        (lambda folder: rewrite(folder, dict.clear), "names no model_type"),
        (another("lama"), "no model type 'lama'; did you mean 'llama'"),
        (another("t5"), "The model type 't5' is not supported"),
        (another("mamba"), "The model type 'mamba' is not supported"),
        (truncated, "is damaged or not a safetensors file"),
        (without_weights, "holds no *.safetensors weights"),
        (with_weight(UP, float("nan")), f"'{UP}' holds NaN or infinite values"),
        (with_weight(UP, float("-inf")), f"'{UP}' holds NaN or infinite values"),
        (adapter, "is a LoRA adapter, not a model; merge it into its base model first"),
    ],
)
def test_a_broken_model_is_one_sentence(
    breakage, sentence: str, words: list[str], command: Command, copy: Path
):
    breakage(copy)
    before = listing(copy.parent)
    ended = command(words[0], copy, *words[1:], "-o", copy.parent / "out", "-q")
    assert_one_sentence(ended, 2, sentence)
    assert listing(copy.parent) == before


def test_a_broken_head_is_one_sentence_when_it_is_rounded(command: Command, copy: Path):
    with_weight("lm_head.weight", float("nan"))(copy)
    before = listing(copy.parent)
    ended = command("quantize", copy, *RTN, "--lm-head-bits", 8, "-o", copy.parent / "out", "-q")
    assert_one_sentence(ended, 2, "The weight of 'lm_head' holds NaN or infinity")
    assert listing(copy.parent) == before


def test_bits_of_patterns_on_the_command_line(command: Command, tiny: Path, tmp_path: Path):
    """Names may hold "=", the last of the same two counts, and its place is where it stands last."""
    folder, where = tmp_path / "out", "re:(?=.*down_proj)"
    bits = [f"{where}=8", "*.layers.0.*=3", f"{where}=2", "*.v_proj=8"]
    words = [word for each in bits for word in ("--set", each)]
    assert command("quantize", tiny, *RTN, *words, "--embedding-bits", "8", "-o", folder, "-q").code == 0
    expected = {"*.layers.0.*": 3, where: 2, "*.v_proj": 8}
    options = yaml.safe_load((folder / "recipe.yaml").read_text())["steps"][0]
    assert list(options["set"].items()) == list(expected.items())
    assert options["embedding_bits"] == 8
    details = read_lineage(folder).steps[0].details
    assert details["linears_by_bits"] == {"2": 4, "3": 5, "4": 15, "8": 4}
    assert "compress-model only" in command("inspect", folder).out
    again = command("run", folder / "recipe.yaml", "-o", tmp_path / "again", "-q")
    assert again.code == 0
    assert read_lineage(tmp_path / "again").result.files == read_lineage(folder).result.files


def test_a_model_without_tokenizer_can_be_rounded_but_not_calibrated(command: Command, copy: Path):
    without_tokenizer(copy)
    before = listing(copy.parent)
    ended = command("prune", copy, *REPLACEME, "-o", copy.parent / "out", "-q")
    assert_one_sentence(ended, 2, "has no tokenizer that can be loaded")
    assert listing(copy.parent) == before
    assert command("quantize", copy, *RTN, "-o", copy.parent / "out", "-q").code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantize", "nosuch/of/these", *RTN, "-o", "out"], "There is no model folder 'nosuch/of/these'"),
        (["quantize", "./nosuch", *RTN, "-o", "out"], "There is no model folder './nosuch'"),
        (["quantize", "", *RTN, "-o", "out"], "There is no model folder ''"),
        (["quantize", "a file", *RTN, "-o", "out"], "'a file' is a file"),
        (["inspect", "a file"], "'a file' is a file"),
        (["quantize", "TINY", *RTN], "Say where the result goes with -o FOLDER"),
        (["quantize", *RTN, "-o", "out"], "Missing argument 'MODEL'"),
        (["quantize", "TINY", "TINY", *RTN, "-o", "out"], "unexpected extra argument"),
        (["quantize", "TINY", "-o", "out"], "Missing option '--method'"),
        (["quantize", "TINY", *RTN, "--bits", "5", "-o", "out"], "'5' is not one of '2', '3', '4', '8'"),
        (["quantize", "TINY", *RTN, "--set", "*.v_proj", "-o", "out"], "'*.v_proj' is not NAME=VALUE"),
        (
            ["quantize", "TINY", *RTN, "--set", "*=5", "-o", "out"],
            "set: Input should be 2, 3, 4 or 8 (got 5)",
        ),
        (
            ["quantize", "TINY", *RTN, "--set", "nosuch=8", "-o", "out"],
            "The pattern 'nosuch' in 'set' matches no linear",
        ),
        (["quantize", "TINY", *RTN, "--lm-head-bits", "5", "-o", "out"], "'5' is not one of '2', '3', '4'"),
        (
            ["quantize", "TINY", *RTN, "--format", "gptq", "--embedding-bits", "8", "-o", "out"],
            "use the format compressed-tensors",
        ),
        (["quantize", "TINY", *GPTQ, "--calibration", "one.txt", "-o", "out"], "holds less than one window"),
        (["quantize", "TINY", *GPTQ, "--seqlen", "1", "-o", "out"], "seqlen is 1; it must be 2 or more"),
        (["quantize", "TINY", *RTN, "--group-size", "48", "-o", "out"], "48 does not divide"),
        (["quantize", "TINY", *RTN, "--group-size", "many", "-o", "out"], "or 'channel' (got 'many')"),
        (
            ["quantize", "TINY", *RTN, "--ignore", "nosuch", "-o", "out"],
            "'nosuch' in 'ignore' matches no linear",
        ),
        (
            ["quantize", "TINY", *RTN, "--device", "cdua", "-o", "out"],
            "The device 'cdua' cannot be used here",
        ),
        (
            ["quantize", "TINY", *RTN, "--device", "meta", "-o", "out"],
            "The device 'meta' cannot be used here",
        ),
        (["quantize", "TINY", *RTN, "--dtype", "int4", "-o", "out"], "'int4' is not one of 'float32'"),
        (["quantize", "TINY", *RTN, "--seed", "x", "-o", "out"], "'x' is not a valid integer"),
        (["quantize", "QUANTIZED", *RTN, "-o", "out"], "already quantized"),
        (["prune", "QUANTIZED", *REPLACEME, "-o", "out"], "packed layers cannot be pruned"),
        (["quantize", "TINY", *RTN, "-o", "in use"], "in use' is not empty; use --overwrite"),
        (["quantize", "TINY", *RTN, "-o", "in use", "--overwrite"], "other things than a model"),
        (["quantize", "TINY", *RTN, "-o", "/", "--overwrite"], "'/' does not end in a folder's name"),
        (["quantize", "TINY", *RTN, "-o", "in use/.."], "does not end in a folder's name"),
        (["quantize", "TINY", *RTN, "-o", "a file"], "a file' is not a folder"),
        (["quantize", "TINY", *RTN, "-o", "a file/out"], "a file' is not a folder"),
        (["prune", "TINY", "--method", "replaceme", "-o", "out"], "Missing option '--layers'"),
        (["prune", "TINY", *REPLACEME, "--layers", "4", "-o", "out"], "can remove at most 3"),
        (
            ["prune", "TINY", *REPLACEME, "--held-out", "1.5", "-o", "out"],
            "held_out: Input should be less than 1",
        ),
        (
            ["prune", "TINY", *REPLACEME, "--nsamples", "0", "-o", "out"],
            "nsamples: Input should be greater than 0",
        ),
        (["prune", "TINY", *REPLACEME, "--calibration", "empty.txt", "-o", "out"], "empty.txt holds no text"),
        (["prune", "TINY", *REPLACEME, "--calibration", "no.txt", "-o", "out"], "There is no file no.txt"),
        (["prune", "TINY", *REPLACEME, "--calibration", "bundle", "-o", "out"], "did you mean 'bundled'"),
        (["prune", "TINY", *REPLACEME, "--chat-template", "-o", "out"], "has no chat template"),
        (["prune", "TINY", "--method", "flap", "-o", "out"], "Missing option '--ratio'"),
        (["prune", "TINY", *FLAP, "--ratio", "1.5", "-o", "out"], "ratio: Input should be less than 1"),
        (["prune", "TINY", *FLAP, "--ratio", "0.98", "-o", "out"], "A ratio of 0.98 leaves too little"),
        (
            ["prune", "TINY", *FLAP, "--shape", "uniform", "--structure", "AL-AM", "-o", "out"],
            "which shape uniform excludes",
        ),
        (
            ["prune", "TINY", *FLAP, "--compensate", "least-squares", *FEW_TOKENS, "-o", "out"],
            "at least 96 calibration tokens",
        ),
        (["prune", "QUANTIZED", *FLAP, "-o", "out"], "packed layers cannot be pruned"),
        (["prune", "QUANTIZED", "--method", "magnitude", "--ratio", "0.1", "-o", "out"], "packed layers"),
        (["run", "int4", "-m", "TINY", "--set", "steps.0.bts=3", "-o", "out"], "did you mean 'bits'"),
        (["plan", "TINY", "int4", "--set", "steps.0.bits"], "is not a setting"),
        (["inspect", "TINY", "--revision", "v1"], "is no hub model, so it has no revision 'v1'"),
        (["evaluate"], "Missing argument 'MODEL'"),
        (["evaluate", "--json", "TINY"], "write 'compress-model evaluate TINY --json'"),
        (["evaluate", "TINY", "--json", "in use"], "'in use' is a folder; name a file to write to"),
        (["evaluate", "TINY", "--json", "no/x.json"], "There is no folder 'no'"),
        (["evaluate", "TINY", "--context", "1"], "1 is not in the range"),
        (["evaluate", "TINY", "--baseline", "./no"], "There is no model folder './no'"),
        (["evaluate", "TINY", "--device", "cdua"], "The device 'cdua' cannot be used here"),
        (["evaluate", "TINY", "--text", "empty.txt"], "empty.txt holds no text"),
        (["compare"], "Missing argument"),
        (["compare", "TINY"], "has no compression.json"),
        (["compare", "QUANTIZED"], "holds no evaluation yet"),
        (["compare", "QUANTIZED", "--json", "--format", "csv"], "--json and --format csv contradict"),
        (["compare", "QUANTIZED", "-o", "no/x.md"], "There is no folder 'no'"),
        (["recipes", "--copy", "x"], "Say which recipe to copy"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(
    words: list[str],
    sentence: str,
    command: Command,
    tiny: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch,
):
    unevaluated = tmp_path / "QUANTIZED"
    shutil.copytree(quantized, unevaluated)
    (tmp_path / "TINY").symlink_to(tiny, target_is_directory=True)
    (tmp_path / "a file").write_text("x")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "in use").mkdir()
    (tmp_path / "in use" / "kept.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path) | listing(tiny.parent)
    assert_one_sentence(command(*words, *["-q"] * (words[0] not in ("compare", "recipes"))), 2, sentence)
    assert listing(tmp_path) | listing(tiny.parent) == before
    assert (tmp_path / "in use" / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize(("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_a_hub_that_cannot_be_reached_is_one_sentence(
    setting: str, value: object, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, setting, value)
    ended = command("inspect", "someone/something")
    assert_one_sentence(ended, 1, "'someone/something' is not a folder here, and the hub cannot be reached")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied: x."),
        (MemoryError(), 1, "not enough memory"),
        (ValueError("a\nb"), 1, "Internal error (ValueError: a b); --debug shows where"),
    ],
)
def test_what_nobody_foresaw_is_one_sentence_too(
    error, code: int, sentence: str, command: Command, monkeypatch
):
    monkeypatch.setattr(compress.recipe, "load_recipe", mock.Mock(side_effect=error))
    ended = command("run", "int4")
    # After ^C click ends the line that the terminal put it on.
    assert_one_sentence(ended._replace(err=ended.err.removeprefix("\n")), code, sentence)


def test_debug_shows_the_traceback(command: Command):
    ended = command("run", "nosuch", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("Error: There is no recipe 'nosuch'")


def test_no_arguments_show_the_help(command: Command):
    ended = command()
    assert ended.code == 2
    assert "quantize" in ended.out + ended.err


# --- evaluate and compare


def test_dense_against_dense_is_no_difference(command: Command, tiny: Path, copy: Path, monkeypatch):
    """The copy has another hash, so it is streamed and scored like any other model."""
    rewrite(copy, lambda config: config.update(note="the same model"))
    measured = Scorecard.model_fields["cost"].annotation.model_fields["measured"].default
    monkeypatch.setattr(compress.evaluate, "measure", lambda *_, **__: measured)
    dense, same = command("evaluate", copy, "--baseline", tiny, *SCORING, "--json").document
    assert dense["model"]["sha256"] == dense["baseline"]["sha256"] == same["baseline"]["sha256"]
    assert same["model"]["sha256"] != dense["model"]["sha256"]
    for card in (dense, same):
        fidelity = card["fidelity"]
        assert fidelity["kl_mean"]["value"] == 0
        assert fidelity["top1_agreement"]["value"] == 1
        assert fidelity["perplexity_ratio"]["value"] == 1
    assert same["fidelity"]["perplexity"] == dense["fidelity"]["perplexity"]
    assert len(command("evaluate", copy, *SCORING, "--json").document) == 1
    assert not (copy / "compression.json").exists()


def test_an_evaluation_that_cannot_be_kept_is_shown(
    command: Command, quantized: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "compression.json")

    monkeypatch.setattr(compress.evaluate, "measure", lambda *_, **__: None)
    monkeypatch.setattr(compress.evaluate, "add_evaluations", refuse)
    ended = command("evaluate", quantized, "--baseline", tiny, *SCORING, "-q", "--json")
    assert ended.code == 0
    assert len(ended.document) == 2
    assert ended.err == f"The evaluation is not kept in '{quantized}' (Read-only file system).\n"


def test_a_run_evaluates_its_own_result_against_the_revision_it_began_with(
    command: Command, tiny: Path, tmp_path: Path, monkeypatch
):
    found = []
    monkeypatch.setattr("compress.run.find_model", lambda *_: ModelSource("us/tiny", "abc", tiny))
    monkeypatch.setattr(
        "compress.evaluate.evaluate_folder", lambda *args, **kwargs: found.append((args, kwargs))
    )
    (tmp_path / "recipe.yaml").write_text("{model: us/tiny, revision: abc, steps: [], evaluate: {}}")
    monkeypatch.chdir(tmp_path)
    assert command("run", "recipe.yaml", "-o", "demo").code == 0
    (((model,), options),) = found
    assert Path(model) == tmp_path / "demo"
    assert find_model(model).folder == tmp_path / "demo"  # and not the demo model
    assert (options["baseline"], options["baseline_revision"]) == ("us/tiny", "abc")


def test_every_command_that_opens_a_model_takes_its_revision(
    command: Command,
    tiny: Path,
    quantized: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = set()

    def find(name: str, revision: str | None = None) -> ModelSource:
        asked.add((name, revision))
        return ModelSource(name, revision, quantized if name == "us/small" else tiny)

    for module in ("models", "evaluate", "run"):
        monkeypatch.setattr(f"compress.{module}.find_model", find)
    monkeypatch.setattr(compress.evaluate, "measure", lambda *_, **__: None)
    monkeypatch.setattr(compress.evaluate, "add_evaluations", lambda *_: None)
    both = ["--baseline", "us/tiny", "--baseline-revision", "v0"]
    for words in (
        ["inspect", "us/tiny", "--revision", "v1"],
        ["plan", "us/tiny", recipe, "--revision", "v2"],
        ["run", recipe, "-m", "us/tiny", "--revision", "v3", "--dry-run"],
        ["quantize", "us/tiny", *RTN, "--revision", "v4", "--dry-run"],
        ["evaluate", "us/small", "--revision", "v5", *both, *SCORING],
    ):
        assert command(*words).code == 0
    assert asked == {("us/tiny", f"v{n}") for n in range(5)} | {("us/small", "v5")}


@pytest.mark.usefixtures("measured_here")
def test_an_evaluation_is_kept_and_shown(command: Command, tiny: Path, quantized: Path, tmp_path: Path):
    result = Path(shutil.copytree(quantized, tmp_path / "result"))
    ended = command("evaluate", result, "--baseline", tiny, *SCORING, "--json", tmp_path / "cards.json", "-q")
    assert (ended.code, ended.err) == (0, "")
    assert "top-1" in ended.out
    document = json.loads((tmp_path / "cards.json").read_text())
    kept = read_lineage(result).evaluations
    assert kept == document
    assert [card["model"]["name"] for card in kept] == ["tiny", "result"]
    fidelity, cost = kept[1]["fidelity"], kept[1]["cost"]
    assert fidelity["kl_mean"]["value"] > 0
    assert cost["measured"]["kernel"] != "torch"
    assert cost["weight_bytes"] == (result / "model.safetensors").stat().st_size

    card = (result / "README.md").read_text()
    markdown = command("compare", result, "--format", "markdown").out
    assert markdown.startswith("| model |")
    assert f"\n## Evaluation\n\n{markdown}\n## Recipe\n" in card
    assert "| result |" in card

    from_file = command("compare", tmp_path / "cards.json", "--format", "csv").out
    assert from_file == command("compare", result, "--format", "csv").out
    assert len(from_file.splitlines()) == 3
    assert len(command("compare", result, "--json").document["rows"]) == 2
    assert command("compare", result, "-o", tmp_path / "table.txt") == Ended(0, "", "")
    assert "result" in (tmp_path / "table.txt").read_text()
    assert "2 evaluation(s) on record" in command("inspect", result).out


# --- methods of third parties


class Halve(Method):
    """Do nothing, under another name.

    For the tests of the registry.
    """

    name, family, paper, needs_calibration = "halve", "pruning", Paper("None"), False

    class Options(MethodOptions):
        times: int = 1

    def plan(self, shape, options):
        return shape

    def apply(self, model, options, run):
        return StepReport(f"did nothing {options.times} times")


class Nameless(Halve):
    name = "another"


@pytest.fixture
def third_parties(monkeypatch: pytest.MonkeyPatch):
    """Makes entry points as installed packages would: name="module:Class"."""
    monkeypatch.setitem(sys.modules, "third_party", SimpleNamespace(Halve=Halve, Nameless=Nameless, text="x"))

    def install(**points: str) -> None:
        found = [SimpleNamespace(name=name, value=value) for name, value in points.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry.method_names.cache_clear()

    yield install
    registry.method_names.cache_clear()


def test_a_third_partys_method_is_one_of_us(third_parties, command: Command, tiny: Path, tmp_path: Path):
    third_parties(halve="third_party:Halve")
    assert "halve" in command("methods").out
    assert command("methods", "halve", "--json").document[0]["options"][0]["name"] == "times"
    assert "--times" in command("prune", "MODEL", "--method", "halve", "--help").out
    assert_one_sentence(command("prune", "m", "--method", "halv"), 2, "did you mean 'halve'")
    assert_one_sentence(
        command("quantize", "m", "--method", "halve"), 2, "a method of pruning, not of quantiz"
    )
    ended = command("prune", tiny, "--method", "halve", "--times", "3", "-o", tmp_path / "out")
    assert "halve: did nothing 3 times" in ended.out
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"] == [
        {"method": "halve", "times": 3}
    ]


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ("no_such_module:Class", "cannot be imported from no_such_module:Class: No module named"),
        ("third_party:Missing", "cannot be imported from third_party:Missing"),
        ("third_party:text", "cannot be imported from third_party:text: 'str' object is not callable"),
        ("third_party:Nameless", "is broken: third_party:Nameless must be a Method with this name"),
        ("builtins:dict", "is broken: builtins:dict must be a Method with this name"),
    ],
)
def test_a_broken_method_of_a_third_party_harms_no_other(
    point: str, sentence: str, third_parties, command: Command
):
    third_parties(broken=point, halve="third_party:Halve", rtn="third_party:Halve")
    ended = command("methods", "--json")
    assert ended.code == 0
    assert sentence in ended.err
    assert ended.err.count("\n") == 1
    ours = {name for family in METHODS.values() for name in family}
    assert {found["name"] for found in ended.document} == {"halve", *ours}
    assert_one_sentence(command("methods", "broken"), 1, sentence)
    assert_one_sentence(command("prune", "m", "--method", "broken"), 1, sentence)
    assert command("methods", "rtn", "--json").document[0]["family"] == "quantization"  # ours stays ours
