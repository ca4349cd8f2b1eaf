"""An export that measures text goes on where an interrupted one was."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

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


@pytest.mark.parametrize("target", TARGETS)
def test_it_does_no_layer_twice(
    target: str, tmp_path: Path, shared_decoder: Callable[..., Path], work: Work
) -> None:
    model = shared_decoder("LlamaForCausalLM")

    def export(file: str, *options: str, most: int = 99) -> list[int]:
        """The layers that were finished."""
        work.finished, work.most = [], most
        text = ("--calibration", str(model.parent / "text.txt"), "--nsamples", "2", "--seqlen", "32")
        fixed = ("export", str(model), "--format", target, *TARGETS[target], *text)
        done = CliRunner().invoke(cli, [*fixed, "-q", "-o", str(tmp_path / file), *options])
        assert done.exit_code == (most < 2)
        return work.finished

    assert export("whole.gguf") == export("other.gguf", "--seed", "1") == [1, 2]
    assert export("file.gguf", most=1) == [1]
    assert not (tmp_path / "file.gguf").exists()
    assert export("file.gguf") == [2]
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*.partial"))

    assert export("file.gguf", "--overwrite", most=1) == [1]
    assert export("file.gguf", "--overwrite", "--seed", "1") == [1, 2]  # other text is other work
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
