"""Runs in this process: what a command would do at moments that are hard to hit from outside; lineage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.calibration.text.windows import evaluation_windows
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput, CompressError
from compress.evaluation.beforehand import check_not_calibrated_on
from compress.pipeline import artefact, workspace
from compress.pipeline import run as module
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.pipeline.workspace import Workspace
from compress.sources.find import find_model
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import LINEAGE, Lineage, read_lineage

from .house import STEPS, House, check_whole, left_behind


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("small"), layers=4)


def copy(house: House, output: Path, overwrite: bool = False, **more: Any) -> Lineage:
    """A run without steps."""
    return execute(parse_recipe(house.data(steps=[], **more)), output, overwrite=overwrite)


def test_the_same_command_twice(small: House, tmp_path: Path):
    first = copy(small, tmp_path / "out")
    with pytest.raises(BadInput, match="is not empty; use --overwrite"):
        copy(small, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    second = copy(small, tmp_path / "empty")
    assert first.result.files == second.result.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_an_output_that_appears_meanwhile_is_kept(
    small: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_plan = module.make_plan

    def plan_slowly(*what: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").touch()
        return make_plan(*what)

    monkeypatch.setattr(module, "make_plan", plan_slowly)
    with pytest.raises(BadInput, match="is not empty"):
        copy(small, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_overwrite_replaces_everything(small: House, tmp_path: Path):
    output = tmp_path / "out"
    copy(small, output)
    (output / "precious.txt").touch()
    copy(small, output, overwrite=True, dtype="bfloat16")
    assert read_lineage(output).dtype == "bfloat16"
    assert not (output / "precious.txt").exists()
    assert left_behind(output) == []


class Killed(BaseException):
    """Stands for a SIGKILL: nothing that handles errors sees it."""


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Killed()], ids=["failing", "killed"])
def test_overwrite_that_fails_between_the_renames_keeps_the_old_one(
    small: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    output = tmp_path / "out"
    old = copy(small, output)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "artefact":
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises((CompressError, Killed)) as caught:
            copy(small, output, overwrite=True, dtype="bfloat16")
    if isinstance(error, OSError):
        assert "could not be moved to" in str(caught.value)
        check_whole(output, old)
    else:
        assert left_behind(output) == [".out.old", ".out.partial"]
        with pytest.raises(BadInput, match="is not empty"):
            copy(small, output)
        check_whole(output, old)
    assert left_behind(output) == [".out.partial"]
    new = copy(small, output, overwrite=True, dtype="bfloat16")
    check_whole(output, new)
    assert new.result.files != old.result.files
    assert left_behind(output) == []


@pytest.mark.parametrize("moment", ["published", "throwing away", "beginning"])
def test_leftovers_of_a_killed_run_are_cleared_by_the_next(
    small: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    output = tmp_path / "out"
    discard, rmtree = Workspace.discard, shutil.rmtree

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def refuse(*_: Any) -> None:
        raise BadInput("No.")

    with monkeypatch.context() as patch:
        if moment == "published":
            patch.setattr(Workspace, "discard", lambda self: killed() if output.exists() else discard(self))
        elif moment == "throwing away":  # half of what a refused run has done
            patch.setattr(module, "reload_check", refuse)
            patch.setattr(
                shutil,
                "rmtree",
                lambda path, **_: killed() if (path / "artefact").exists() else rmtree(path, **_),
            )
        else:
            patch.setattr(workspace, "write_atomically", killed)
        with pytest.raises(Killed):
            copy(small, output)
    assert ".out.partial" in left_behind(output)
    # Another recipe: there is nothing to go on with any more.
    copy(small, output, overwrite=True, dtype="bfloat16")
    assert left_behind(output) == []


@pytest.mark.parametrize("part", ["model", "calibration", "recipe", "compress-model"])
def test_an_interrupted_run_is_resumed_only_if_nothing_changed(tmp_path: Path, part: str):
    names = ("model", "calibration", "recipe", "compress-model")
    work = Workspace(tmp_path / "out")
    work.enter(dict.fromkeys(names, "1"))
    (work.folder / "kept").touch()
    work.enter(dict.fromkeys(names, "1"))
    assert (work.folder / "kept").exists()
    with pytest.raises(BadInput, match=f"another {part}; use --fresh"):
        work.enter(dict.fromkeys(names, "1") | {part: "2"})


@pytest.mark.parametrize("steps", [[], STEPS[1:]], ids=["plain", "packed"])
def test_a_written_model_that_is_wrong_is_not_published(
    small: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, Any]]
):
    output = tmp_path / "out"
    recipe = parse_recipe(small.data(steps=steps))

    def write_and_spoil(checkpoint: Checkpoint, source: Path, folder: Path, *more: Any) -> dict[str, str]:
        hashes = artefact.write_model(checkpoint, source, folder, *more)
        data = bytearray((folder / "model.safetensors").read_bytes())
        for position in range(len(data) - 20_000, len(data) - 19_000):
            data[position] ^= 0x1
            data[position] ^= 0x80 * (position % 4 == 3)
        (folder / "model.safetensors").write_bytes(data)
        return hashes

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_model", write_and_spoil)
        with pytest.raises(CompressError, match="does not compute what it did in memory") as caught:
            execute(recipe, output)
    assert caught.value.exit_code == 1
    assert not output.exists()
    lineage = execute(recipe, output)  # the steps are kept
    assert lineage.reload.max_difference <= 1e-3
    assert lineage.reload.promised.loader.startswith("transformers ")
    assert lineage.reload.promised.difference <= 1e-3


def test_bad_weights_that_only_the_check_meets(small: House, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(small.model, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # a NaN at the end of the last tensor
    (broken / "model.safetensors").write_bytes(data)
    recipe = parse_recipe(small.data(STEPS[1:]) | {"model": str(broken)})
    for _ in range(2):
        with pytest.raises(BadInput, match="holds NaN or infinite values; rtn is done and kept"):
            execute(recipe, tmp_path / "out", resume=False)
        assert left_behind(broken) == [".out.partial"]


# Lineage


def test_an_artefact_of_an_artefact_keeps_the_whole_lineage(
    small: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    step = STEPS[0] | {"layers": 1}
    first = execute(parse_recipe(small.data([step])), pruned)
    add_evaluations_quietly(pruned)
    second = execute(parse_recipe({"model": str(pruned), "steps": STEPS[1:]}), packed)

    assert second.calibration is None
    assert second.parent.lineage == first.model_copy(update={"evaluations": []})
    read = read_lineage(packed)
    assert read == second
    assert [[step.method for step in run.steps] for run in read.chain()] == [["replaceme"], ["rtn"]]
    assert [run.name for run in read.chain()] == ["pruned", "packed"]

    card = (packed / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["tags"] == ["compress-model", "pruning", "quantization"]
    assert text.index("**replaceme**") < text.index("**rtn**")
    assert f"from `{small.text}`" in text

    from compress.commands.inspect import inspect

    inspect.main([str(packed)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert shown.index("replaceme (") < shown.index("rtn (")

    tokenizer = load_tokenizer(packed)
    windows = evaluation_windows(tokenizer, str(small.text), 32)
    with pytest.raises(BadInput, match=r"was calibrated on \d+ of the documents"):
        check_not_calibrated_on(find_model(str(packed)), windows.document_hashes, "the text")
    (tmp_path / "unseen.txt").write_text("w1 w2 w3 w4")
    windows = evaluation_windows(tokenizer, str(tmp_path / "unseen.txt"), 32)
    check_not_calibrated_on(find_model(str(packed)), windows.document_hashes, "the text")


def add_evaluations_quietly(folder: Path) -> None:
    """An evaluation on record, without the minutes it takes to make one."""
    lineage = read_lineage(folder)
    lineage.evaluations.append({"suite": "made up"})
    (folder / LINEAGE).write_text(lineage.model_dump_json())
