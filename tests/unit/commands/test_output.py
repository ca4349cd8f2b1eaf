"""What commands print and write: documents and tables, dry runs, plans, inspection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.commands.common import make_table, stdout
from compress.storage.lineage import read_lineage

from .common import REPLACEME, RTN, Command, Ended, assert_one_sentence, listing


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
            [rtn("compressed-tensors", 3, 32, True, set={"*.v_proj": 8}, lm_head_bits=8, embedding_bits=4)],
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
    assert "did not write this model" in dense.out
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
    assert str(read_lineage(fewer).reload.promised).startswith("transformers ")
    words = [*search, "--blocks", "1", "--mode", "mlp", "--order-from", whole, "-o", tmp_path / "x"]
    assert_one_sentence(command(*words), 2, "was found with another mode; search again")
    assert not (tmp_path / "x").exists()


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
