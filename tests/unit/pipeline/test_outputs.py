"""Where a result may go: links, disks, and folders that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compress.commands.common import check_file
from compress.errors import BadInput, CompressError
from compress.evaluation.harness.cards import samples_folder
from compress.pipeline.workspace import Workspace
from compress.system import cache
from compress.system.cache import make_folder


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be written: also for root, who may write everywhere."""
    folder = tmp_path / "closed"
    folder.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    return folder


def test_a_link_leads_to_work_beside_its_target(tmp_path: Path):
    target = tmp_path / "elsewhere" / "target"
    target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    workspace = Workspace(link)
    assert (workspace.output, workspace.folder) == (target, target.with_name(".target.partial"))
    workspace.enter({})
    workspace.artefact.mkdir()
    (workspace.artefact / "config.json").write_text("{}")
    workspace.publish()
    assert link.is_symlink()
    assert [file.name for file in link.iterdir()] == ["config.json"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["out", "new/folders/out"])
def test_a_folder_that_cannot_be_written_is_named(closed: Path, name: str):
    with pytest.raises(BadInput, match=f"cannot be created, because '{closed}' cannot be written"):
        Workspace(closed / name)


def test_a_whole_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    Workspace(tmp_path / "out")
    with pytest.raises(BadInput, match="is a whole disk; name a folder on it"):
        Workspace(tmp_path)


def test_a_file_in_a_folder_that_cannot_be_written_is_refused(closed: Path):
    check_file(closed.with_name("open.json"))
    with pytest.raises(BadInput, match=r"out\.json' cannot be written, because the folder"):
        check_file(closed / "out.json")


def test_a_cache_that_cannot_be_written_is_told_before_the_work(closed: Path):
    make_folder(closed.with_name("new") / "folder")
    with pytest.raises(CompressError, match=f"{cache.CACHE_VARIABLE} to another folder"):
        make_folder(closed)


def test_samples_go_into_a_folder_that_can_be_written(closed: Path):
    samples_folder(closed.with_name("new") / "samples")
    assert (closed.with_name("new") / "samples").is_dir()
    with pytest.raises(
        BadInput, match=r"closed' for questions and answers cannot be written \(Permission denied"
    ):
        samples_folder(closed)
    (file := closed.with_name("file")).write_text("mine")
    with pytest.raises(BadInput, match="file' is a file; name a folder for questions and answers"):
        samples_folder(file)
    assert file.read_text() == "mine"


def test_tests_leave_the_users_cache_alone(users_cache: Path):
    own = cache.cache_folder()
    assert own != users_cache
    assert (own / "kernels").samefile(users_cache / "kernels")
