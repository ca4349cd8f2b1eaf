"""What goes wrong is told in one sentence, with the right exit code, and leaves nothing behind."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import compress.pipeline.recipe

from .common import REPLACEME, RTN, Command, assert_one_sentence, listing, rewrite

GPTQ = ["--method", "gptq", "--group-size", "32"]
FLAP = ["--method", "flap", "--ratio", "0.2"]
FEW_TOKENS = ["--nsamples", "1", "--seqlen", "32"]


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


def with_setting(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda config: config.update({name: value}))


@pytest.mark.parametrize("words", [["prune", *REPLACEME], ["quantize", *RTN]], ids=["prune", "quantize"])
@pytest.mark.parametrize(
    ("breakage", "sentence"),
    [
        (not_json, "config.json is not JSON"),
        (lambda folder: rewrite(folder, dict.clear), "does not name a model_type"),
        (with_setting("architectures", 3), "are no list of classes"),
        (with_setting("quantization_config", 3), "is not a JSON object"),
        (with_setting("num_key_value_heads", 0), "describes a llama model that cannot be built"),
        (with_setting("pruned", {"layers": []}), "describes a llama model that cannot be built"),
        (another("lama"), "no model type 'lama'; did you mean 'llama'"),
        (another("t5"), "The model type 't5' is not supported"),
        (another("mamba"), "The model type 'mamba' is not supported"),
        (truncated, "is damaged or not a safetensors file"),
        (without_weights, "holds no *.safetensors weights"),
        (with_weight(UP, float("nan")), f"'{UP}' holds NaN or infinite values"),
        (with_weight(UP, float("-inf")), f"'{UP}' holds NaN or infinite values"),
        (adapter, "holds an adapter, not a model; merge it into its base model (tiny) first"),
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
        (["quantize", "TINY", *RTN, "--bits", "9", "-o", "out"], "'9' is not one of '2', '3', '4', '5'"),
        (["quantize", "TINY", *RTN, "--set", "*.v_proj", "-o", "out"], "'*.v_proj' is not NAME=VALUE"),
        (
            ["quantize", "TINY", *RTN, "--set", "*=9", "-o", "out"],
            "set: Input should be 2, 3, 4, 5, 6, 7 or 8 (got 9)",
        ),
        (
            ["quantize", "TINY", *RTN, "--set", "nosuch=8", "-o", "out"],
            "The pattern 'nosuch' in 'set' matches no linear",
        ),
        (["quantize", "TINY", *RTN, "--lm-head-bits", "9", "-o", "out"], "'9' is not one of '2', '3', '4'"),
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
        (["quantize", "TINY", *RTN, "-o", "in use", "--overwrite"], "something other than a model"),
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
        (["inspect", "TINY", "--revision", "v1"], "is not a hub model, so it has no revision 'v1'"),
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
        (["compare", "", "QUANTIZED"], "An empty name is no model"),
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
    assert_one_sentence(ended, 1, "'someone/something' is not a folder here, and cannot be downloaded")


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
    monkeypatch.setattr(compress.pipeline.recipe, "load_recipe", mock.Mock(side_effect=error))
    ended = command("plan", "m", "int4")
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
