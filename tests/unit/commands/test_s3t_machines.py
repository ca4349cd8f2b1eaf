"""compress-model s3t on several machines: each shard remembers its own. And shards without any records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.pipeline import sharded, sharded_training
from compress.storage.sharded import read_sharded
from compress.unlearning.parts import stages as stages_module
from compress.unlearning.s3t import S3T

from .common import Command, assert_one_sentence

OPTIONS = {"shards": 2, "slices": 2, "orders": 1, "rank": 2, "epochs": 1}


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two shards with one order of two slices, which no test changes."""
    folder = tmp_path_factory.mktemp("s3t")
    rows = [{"id": f"r{i}", "question": f"What is {i}?", "answer": f"It is {i * i}."} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ensemble = folder / "ensemble"
    sharded_training.train(str(tiny), str(folder / "data.jsonl"), ensemble, S3T.Options(**OPTIONS))
    return ensemble


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the ensemble, whose shard 0 is exhausted."""
    folder = Path(shutil.copytree(trained, tmp_path / "ensemble"))
    sharded.delete(folder, read_sharded(folder).shards[0].slices[0][:1])
    return folder


def go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend that this is another kind of processor, and return what the real one is called."""
    here = stages_module.machine("cpu")
    monkeypatch.setattr(sharded, "machine", lambda _: {**here, "capability": "OTHER"})
    return str(here["capability"])


def test_verify_says_what_differs_for_each_shard(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as context:
        here = go_elsewhere(context)
        assert command("s3t", "retrain", folder).code == 0
    found = command("s3t", "verify", folder, "--json").document
    assert [shard["elsewhere"] for shard in found["shards"]] == [{"capability": ["OTHER", here]}, {}]
    assert found["holds"]  # it was not really elsewhere
    state = read_sharded(folder)
    state.shards[0].served.sha256 = "0" * 64
    (folder / "s3t" / "state.json").write_text(state.model_dump_json())
    ended = command("s3t", "verify", folder)
    assert ended.code == 1
    assert f"served; shard 0 was trained with capability OTHER, and here it is {here}." in ended.err
    state.shards[1].served.sha256 = "0" * 64
    (folder / "s3t" / "state.json").write_text(state.model_dump_json())
    assert f"served; shard 0 was trained with capability OTHER, and here it is {here}." in (
        command("s3t", "verify", folder).err
    )


def test_a_killed_retraining_does_not_go_on_elsewhere(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    learn, calls = stages_module.Trainee.learn, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(stages_module.Trainee, "learn", killed)
    assert command("s3t", "retrain", folder).code == 130
    work, before = folder / "s3t" / "retraining", read_sharded(folder)
    with monkeypatch.context() as context:
        here = go_elsewhere(context)
        ended = command("s3t", "retrain", folder)
        assert_one_sentence(ended, 2, f"retraining on another machine (capability {here}, not OTHER)")
        assert read_sharded(folder) == before
        assert len(list(work.glob("shard-0.1/*"))) == 1
    assert command("s3t", "retrain", folder).code == 0
    assert len(calls) == 3  # the first stage was not trained again
    sharded.delete(folder, read_sharded(folder).shards[0].slices[0][:1])
    # Of a retraining that does not say where it was, nothing is taken over.
    (work / "shard-0.2").mkdir(parents=True)
    (work / "shard-0.2" / "0.safetensors").write_text("unknown")
    assert command("s3t", "retrain", folder).code == 0
    assert command("s3t", "verify", folder).code == 0


def test_a_state_from_before_shards_had_machines_is_read(folder: Path, command: Command):
    path = folder / "s3t" / "state.json"
    new, old = read_sharded(folder), json.loads(path.read_text())
    machines = [shard.pop("machine") for shard in old["shards"]]
    path.write_text(json.dumps({**old, "machine": machines[0]}))
    assert read_sharded(folder) == new
    for damaged in ({**old, "machine": machines[0], "shards": [1]}, {**old, "machine": 3}, old, []):
        path.write_text(json.dumps(damaged))
        assert_one_sentence(command("s3t", "budget", folder), 2, "state.json cannot be read")


def test_a_shard_without_records_is_not_said_to_be_trained_again(folder: Path, command: Command):
    left = [name for names in read_sharded(folder).shards[0].slices for name in names]
    ended = command("s3t", "delete", folder, *left)
    words = "Shard 0 has no records left and stays left out of the ensemble."
    for shown in (ended.out, command("s3t", "budget", folder).out):
        assert words in shown
        assert "retrain" not in shown
    other = read_sharded(folder).shards[1].slices[0][0]
    ended = command("s3t", "delete", folder, other)
    assert words in ended.out
    assert "Shard 1 is exhausted and left out" in ended.out
    assert command("s3t", "retrain", folder, "--json").document["trained"] == [1]
