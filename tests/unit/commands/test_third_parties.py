"""Methods of third parties, by the entry points of their packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from compress.method import Method, MethodOptions, Paper, StepReport
from compress.pipeline import registry
from compress.pipeline.registry import METHODS

from .common import Command, Ended, assert_one_sentence


class Halve(Method):
    """Do nothing, under another name.

    For the tests of the registry.
    """

    name, family, paper, needs_calibration = "halve", "pruning", Paper("None"), False

    class Options(MethodOptions):
        times: int = 1
        renamed = {"repeat_count": "times"}  # noqa: RUF012

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


def test_it_is_in_the_help_and_the_completion_of_its_family(third_parties, command: Command, monkeypatch):
    third_parties(halve="third_party:Halve", broken="no_such_module:Class")
    assert "halve" in " ".join(command("prune", "--help").out.split())
    assert "halve" not in command("quantize", "--help").out
    monkeypatch.setenv("_COMPRESS_MODEL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "compress-model prune m --method h")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert command() == Ended(0, "plain,halve\n", "")


def test_an_option_that_was_renamed_says_its_new_name(third_parties, command: Command, tmp_path: Path):
    third_parties(halve="third_party:Halve")
    words = ("prune", "m", "--method", "halve")
    assert_one_sentence(
        command(*words, "--repeat-count", "3"), 2, "The option '--repeat-count' is now called '--times'."
    )
    (tmp_path / "r.yaml").write_text("{model: m, steps: [{method: halve, repeat_count: 3}]}")
    assert_one_sentence(
        command("run", tmp_path / "r.yaml", "-o", "x"), 2, "the option 'repeat_count' is now called 'times'"
    )


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
