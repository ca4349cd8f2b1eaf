"""An export that measures text goes on where an interrupted one was."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from compress.cli import cli
from compress.engine.activations import Activations
from compress.engine.journal import Journal

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("own_cache")

TARGETS = {"gguf": ("--types", "Q4_0", "--importance", "measured", "--no-verify"), "imatrix": ()}


@dataclass
class Work:
    """The numbers of layers that were made durable; the disk has room for ``most`` at a time."""

    finished: list[int] = field(default_factory=list)
    most: int = 99


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    found, commit = Work(), Journal.commit

    def counted(journal: Journal, finished: int, held: list[Activations]) -> None:
        if len(found.finished) == found.most:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(journal, finished, held)
        found.finished.append(finished)

    monkeypatch.setattr(Journal, "commit", counted)
    return found


@dataclass
class Export:
    """The command, for one model and target."""

    model: Path
    target: str
    folder: Path
    work: Work

    def __call__(self, file: str, *options: str, most: int = 99) -> list[int]:
        """The layers that were finished."""
        result = self.invoke(file, *options, most=most)
        assert result.exit_code == (most < 2)
        return self.work.finished

    def invoke(self, file: str, *options: str, most: int = 99) -> Result:
        self.work.finished, self.work.most = [], most
        text = ("--calibration", str(self.model.parent / "text.txt"), "--nsamples", "2", "--seqlen", "32")
        fixed = ("export", str(self.model), "--format", self.target, *TARGETS[self.target], *text)
        return CliRunner().invoke(cli, [*fixed, "-q", "-o", str(self.folder / file), *options])


@pytest.fixture(params=TARGETS)
def export(
    request: pytest.FixtureRequest, tmp_path: Path, shared_decoder: Callable[..., Path], work: Work
) -> Export:
    return Export(shared_decoder("LlamaForCausalLM"), request.param, tmp_path, work)


def test_it_does_no_layer_twice(export: Export, tmp_path: Path) -> None:
    assert export("whole.gguf") == export("other.gguf", "--seed", "1") == [1, 2]
    assert export("file.gguf", most=1) == [1]
    assert not (tmp_path / "file.gguf").exists()
    assert export("file.gguf") == [2]
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*.partial"))

    assert export("file.gguf", "--overwrite", most=1) == [1]
    assert export("file.gguf", "--overwrite", "--seed", "1") == [1, 2]  # other text is other work
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_after_damaged_work_it_starts_over(export: Export, tmp_path: Path) -> None:
    assert export("file.gguf", most=1) == [1]
    kept = next((tmp_path / ".file.gguf.partial").rglob("hidden.*"))
    kept.write_bytes(b"")
    refused = export.invoke("file.gguf")
    assert refused.exit_code == 1
    assert str(refused.exception).startswith(f"The activations in '{kept}' are cut short or gone; start over")
    assert "goes on" not in str(refused.exception)
    assert export("file.gguf") == [1, 2]
