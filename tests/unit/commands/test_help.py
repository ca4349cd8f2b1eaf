"""The command line as its users meet it first: help, the names of things, completion."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compress.cli import COMMANDS
from compress.pipeline.registry import METHODS

from .common import REPLACEME, Command, assert_one_sentence


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
        (["methods", ""], "no method ''"),
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
    for option in (
        "--layers",
        "--epochs",
        "--exact/--no-exact",
        "[auto|cosine|least-squares|none]",
        "--nsamples",
    ):
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
