"""What is left of a run whose later step fails: the finished steps, for the next run with the same output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from compress.cli import main
from compress.errors import BadInput, CompressError
from compress.pipeline import run as module
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.pruning.magnitude import Magnitude
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.lineage import read_lineage

from .house import House, left_behind

PRUNE = {"method": "magnitude", "ratio": 0.2}
QUANTIZE = {"method": "rtn", "group_size": 8}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), layers=2)


def failing(monkeypatch: pytest.MonkeyPatch, cls: type, kind: type[Exception], text: str) -> None:
    def apply(*_: Any) -> None:
        raise kind(text)

    monkeypatch.setattr(cls, "apply", apply)


@pytest.mark.parametrize("kind", [BadInput, CompressError])
def test_a_late_failure_keeps_the_finished_steps(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CompressError]
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, RoundToNearest, kind, "This will not do.")
        for _ in range(2):  # again: the step that is done is not done again, and still kept
            with pytest.raises(kind) as caught:
                execute(parse_recipe(house.data([PRUNE, QUANTIZE])), output)
            assert type(caught.value) is kind
            assert str(caught.value) == (
                "This will not do; magnitude is done and kept for the next run with this -o."
            )
            failing(patch, Magnitude, AssertionError, "done again")
    with monkeypatch.context() as patch:
        failing(patch, Magnitude, AssertionError, "done again")
        other = QUANTIZE | {"bits": 8} if kind is BadInput else QUANTIZE
        lineage = execute(parse_recipe(house.data([PRUNE, other])), output)
    assert [step.method for step in lineage.steps] == ["magnitude", "rtn"]
    assert lineage.steps[1].options["bits"] == other.get("bits", 4)
    assert read_lineage(output) == lineage
    assert left_behind(output) == []


def test_other_finished_steps_are_another_run(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, RoundToNearest, BadInput, "No.")
        with pytest.raises(BadInput, match="is done and kept"):
            execute(parse_recipe(house.data([PRUNE, QUANTIZE])), output)
    for steps in ([PRUNE | {"ratio": 0.3}, QUANTIZE], [QUANTIZE], []):
        with pytest.raises(BadInput, match="interrupted run with another recipe; use --fresh"):
            execute(parse_recipe(house.data(steps)), output)
    lineage = execute(parse_recipe(house.data([PRUNE])), output)  # what is done is enough
    assert [step.method for step in lineage.steps] == ["magnitude"]


def test_a_failure_of_the_first_step_leaves_nothing(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, Magnitude, BadInput, "No.")
    with pytest.raises(BadInput, match=r"^No\.$"):
        execute(parse_recipe(house.data([PRUNE, QUANTIZE])), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_behind_all_steps_keeps_them(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {house.model}\nsteps: [{{method: rtn, group_size: 8}}]")

    def wrong(*_: Any) -> None:
        raise BadInput("The model cannot be read.")

    with monkeypatch.context() as patch:
        patch.setattr(module, "reload_check", wrong)
        patch.setattr(sys, "argv", ["compress-model", "run", str(recipe), "-o", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    assert "The model cannot be read; rtn is done and kept" in capsys.readouterr().err
    failing(monkeypatch, RoundToNearest, AssertionError, "done again")
    assert execute(parse_recipe({"model": str(house.model), "steps": [QUANTIZE]}), tmp_path / "out")
