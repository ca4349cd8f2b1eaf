"""Streams in memory or in files, unbroken or resumed: all end the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.engine import activations
from compress.engine import journal as journal_module
from compress.engine.activations import Activations
from compress.engine.journal import Journal
from compress.engine.stream import StreamedModel
from compress.errors import CompressError
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

from .common import LAYERS, Subject, everything, make_windows

# Activations in memory and in files


MEMORY, FILES = 1 << 30, 0


@pytest.fixture(params=[MEMORY, FILES], ids=["memory", "files"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(activations, "MEMORY_LIMIT", request.param)
    return request.param


def test_limit_is_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "MEMORY_LIMIT", 96)
    assert not Activations((2, 3, 4), tmp_path / "x").spilled
    assert Activations((2, 3, 5), tmp_path / "x").spilled
    assert not Activations((2, 3, 5), None).spilled


def test_tensors_that_are_held_at_once_share_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "MEMORY_LIMIT", 3 * 96)
    assert activations.memory_limit(shared_by=3) == 96
    assert activations.memory_limit(shared_by=0) == 3 * 96
    assert not Activations((2, 3, 4), tmp_path / "x", shared_by=3).spilled
    assert Activations((2, 3, 4), tmp_path / "x", shared_by=4).spilled


def test_activations_hold_what_was_written(limit: int, tmp_path: Path):
    values = [torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    held = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
    for value in values:
        for start, stop in ((0, 2), (2, 4), (4, 5)):
            held.write(start, value[start:stop])
        held.flip()
        assert torch.equal(held.read(0, 5), value)
        assert torch.equal(held.read(3, 5), value[3:])
        name = held.save()
        assert held.save() == name
        again = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
        again.write(0, values[0])  # as a resumed run does before it restores
        again.flip()
        again.restore(name)
        assert torch.equal(again.read(0, 5), value)
        again.write(0, torch.ones(1, 3, 4))  # and then is killed again
        third = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
        third.restore(name)
        assert torch.equal(third.read(0, 5), value)


def test_activations_that_are_cut_short_are_noticed(limit: int, tmp_path: Path):
    held = Activations((2, 3, 4), tmp_path / "hidden")
    held.write(0, torch.ones(2, 3, 4))
    held.flip()
    name = held.save()
    (tmp_path / name).write_bytes(b"\0" * 90)
    again = Activations((2, 3, 4), tmp_path / "hidden")

    def use() -> None:
        again.restore(name)
        again.read(0, 2)

    with pytest.raises(CompressError, match="cut short"):
        use()


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_spilled_is_bitwise_the_same(
    subject_of: Callable[[str], Subject], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, windows = StreamedModel(Checkpoint.open(subject_of(case).folder)), make_windows(padded=True)
    found = []
    for memory_limit in (1 << 30, 0):
        monkeypatch.setattr(activations, "MEMORY_LIMIT", memory_limit)
        stream = model.stream(windows, tmp_path, batch_tokens=18)
        assert stream.hidden.spilled == (memory_limit == 0)
        states = [everything(stream)]
        for layer in model.walk(None, stream):
            stream.advance(layer)
            states.append(everything(stream))
        found.append(states)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len({state.sum().item() for state in found[0]}) == LAYERS + 1


# Resuming


class Killed(Exception):
    """Stands for a SIGKILL: nothing is tidied up but what Python does when objects go away."""


def body(model: StreamedModel, journal: Journal, folder: Path) -> Iterator[int]:
    """A walk that keeps results in every way there is: stream, extra activations, state and draft. What it
    writes depends on what was there, so a layer done twice shows."""
    stream = model.stream(make_windows(padded=True), folder / "streams", batch_tokens=18)
    extra = journal.activations("extra", stream.hidden.shape)
    journal.state["sum"] = torch.zeros((), dtype=torch.float64)
    for layer in model.walk(journal, stream, extra):
        stream.advance(layer)
        for start, hidden, _ in stream.batches():
            extra.write(start, hidden + extra.read(start, start + len(hidden)) if layer.index else hidden)
        extra.flip()
        journal.state["sum"] += everything(stream).double().sum()
        journal.state[f"view.{layer.index}"] = torch.arange(6.0).reshape(2, 3).T * layer.index
        journal.state.pop(f"view.{layer.index - 2}", None)
        norm = "model.norm.weight"
        journal.draft.write({norm: 2 * journal.draft.read(norm), f"layer.{layer.index}": extra.read(0, 1)})
        journal.draft.drop(f"{layer.name}.mlp.down_proj.weight")
        journal.draft.config["walked"] = layer.index + 1
        yield layer.index
    journal.state["end"], journal.state["extra"] = everything(stream), extra.read(0, 5)


def outcome(journal: Journal) -> dict[str, Any]:
    draft = journal.draft
    draft.flush("step")
    return {
        "state": {name: value.tolist() for name, value in journal.state.items()},
        "draft": {name: draft.read(name).tolist() for name in draft.tensors},
        "config": draft.config,
    }


def begin(llama: Subject, folder: Path) -> tuple[Journal, Iterator[int]]:
    checkpoint = Checkpoint.open(llama.folder)
    journal = Journal(folder / "walk", Draft(checkpoint, folder))
    return journal, body(StreamedModel(checkpoint), journal, folder)


@pytest.fixture(scope="module")
def unbroken(
    subject_of: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    llama = subject_of("llama")
    journal, walk = begin(llama, tmp_path_factory.mktemp("unbroken"))
    assert list(walk) == list(range(LAYERS))
    end = outcome(journal)
    norm = "model.norm.weight"
    assert torch.allclose(torch.tensor(end["draft"][norm]), 8 * llama.model.state_dict()[norm])
    assert set(end["state"]) == {"sum", "view.1", "view.2", "end", "extra"}
    return end


# With activations in files, of which two take turns, at every layer; in memory at one.
@pytest.mark.parametrize("moment", ["in the body", "after the draft", "after the state"])
@pytest.mark.parametrize(
    ("limit", "kill_at"), [*((FILES, index) for index in range(LAYERS)), (MEMORY, 1)], indirect=["limit"]
)
def test_a_walk_killed_anywhere_ends_the_same(
    llama: Subject,
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    kill_at: int,
    moment: str,
):
    def killed(walk: Iterator[int]) -> bool:
        done: list[int] = []
        with monkeypatch.context() as patch:
            if name := {"after the draft": "write_tensors", "after the state": "write_atomically"}.get(
                moment
            ):
                original = getattr(journal_module, name)

                def write(*args: Any) -> None:
                    if kill_at in done:
                        raise Killed
                    original(*args)

                patch.setattr(journal_module, name, write)
            try:
                for index in walk:
                    done.append(index)
                    if index == kill_at and moment == "in the body":
                        return True
            except Killed:
                return True
        return False

    for _ in range(2):  # killed twice at the same place
        assert killed(begin(llama, tmp_path)[1])

    journal, walk = begin(llama, tmp_path)
    assert list(walk) == list(range(kill_at, LAYERS))
    assert outcome(journal) == unbroken


def test_progress_is_told(llama: Subject, tmp_path: Path):
    told: list[tuple[str, float]] = []
    model = StreamedModel(Checkpoint.open(llama.folder), progress=lambda *what: told.append(what))
    for _ in model.walk(Journal(tmp_path), label="looking"):
        pass
    assert told == [("looking", 0.0), ("looking", 1 / 3), ("looking", 2 / 3), ("looking", 1.0)]
    assert json.loads((tmp_path / "progress.json").read_text())["finished"] == LAYERS
    assert list(model.walk(Journal(tmp_path))) == []
