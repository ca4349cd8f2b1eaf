"""Models on the hub as arguments of every command."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from compress.system import hub as talking

from ...hub_server import Blob, Fault, Hub, Repository
from .common import Command, assert_one_sentence

WITH_MODELS = {
    "run": ["RECIPE", "-m", "MODEL", "-o", "OUT"],
    "prune": ["MODEL", "--method", "replaceme", "--layers", "1", "-o", "OUT"],
    "quantize": ["MODEL", "--method", "rtn", "-o", "OUT"],
    "unlearn": [
        "MODEL",
        "--method",
        "npo",
        "--forget",
        "people:forget",
        "--retain",
        "people:retain",
        "-o",
        "OUT",
    ],
    "mix": ["ONE", "-m", "MODEL", "--memory", "90MB", "-o", "OUT.yaml"],
    "evaluate": ["MODEL"],
    "audit": ["MODEL"],
    "compare": ["MODEL"],
    "plan": ["MODEL", "RECIPE"],
    "bench": ["MODEL"],
    "inspect": ["MODEL"],
    "export": ["MODEL", "--format", "huggingface", "-o", "OUT"],
    "s3t": ["train", "MODEL", "people:retain", "-o", "OUT"],
}


@pytest.mark.parametrize("name", WITH_MODELS)
def test_every_command_takes_a_revision_of_a_hub_model(
    name: str, command: Command, hub: Hub, recipe: Path, tmp_path: Path
):
    hub.repositories["me/small"] = Repository(private=True)
    hub.repositories["me/small"].commit("main", {"config.json": Blob(b"{}", False)}, "initial commit")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"steps": [{"method": "rtn", "group_size": 32}]}))
    names = {"MODEL": "me/small", "RECIPE": recipe, "ONE": tmp_path / "one.yaml", "OUT": tmp_path / "out"}
    words = [names.get(word, word) for word in WITH_MODELS[name]]
    ended = command(name, *words, "--revision", "v2", "-q")
    assert_one_sentence(ended, 2, "The hub model 'me/small' has no revision 'v2'")
    assert hub.asked("GET /api/models/me/small/revision/v2") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "TINY", "--baseline", "me/x", "--baseline-revision", "v2"],
        [
            "evaluate",
            "TINY",
            "--baseline",
            "QUANTIZED",
            "--tasks",
            "x",
            "--judge",
            "me/x",
            "--judge-revision",
            "v2",
        ],
        ["audit", "TINY", "--target", "me/x", "--target-revision", "v2"],
        ["audit", "TINY", "--retrained", "me/x", "--retrained-revision", "v2"],
        ["bench", "TINY", "me/x@revision=v2,threads=1"],
        ["compare", "QUANTIZED", "me/x", "--revision", "v2"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-2:]),
)
def test_other_models_of_a_command_may_be_on_the_hub_too(
    words: list[str], command: Command, hub: Hub, tiny: Path, quantized: Path
):
    if "--judge" in words:
        pytest.importorskip("lm_eval")
        words = [word.replace("x", "kick_closed") if word == "x" else word for word in words]
    names = {"TINY": tiny, "QUANTIZED": quantized}
    ended = command(*(names.get(word, word) for word in words), "-q")
    assert ended.code == 2, ended
    assert "'me/x' is neither a folder here nor a model on the hub" in ended.err
    assert hub.asked("GET /api/models/me/x/revision/v2")


def put(hub: Hub, name: str, folder: Path) -> None:
    """Make the files of a folder a private repository."""
    hub.repositories[name] = Repository(private=True)
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    blobs = {
        name: Blob(file.read_bytes(), file.suffix in (".safetensors", ".gguf"))
        for name, file in files.items()
    }
    hub.repositories[name].commit("main", blobs, "initial commit")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("GET /api/models", 0, 99), "the connection to the hub broke; try again"),
        (Fault("HEAD .*safetensors", 0, 99), "the connection to the hub broke"),
        (Fault("GET .*safetensors", 0, 99), "the connection to the hub broke"),
        (Fault("GET .*safetensors", 500, 99), "the hub answered with an error (500)"),
        (Fault("GET .*safetensors", 403, 99), "the hub forbids it with this access token"),
        (Fault("GET /api/models", 429, 99), "the hub takes no more requests for a while (429)"),
        (Fault("GET /api/models", seconds=3, times=99), "the hub did not answer within 1 s"),
        (Fault("GET /api/models", 200, 99), "the hub's answer is not what was asked for (KeyError: 'id')"),
        (Fault("GET .*/tree/", 200, 99), "the hub's answer is not what was asked for (TypeError"),
        (
            Fault("GET .*safetensors", 200, 99),
            "the hub's answer is not what was asked for (OSError: Consistency check failed",
        ),
    ],
    ids=lambda value: f"{value.request} {value.status}" if isinstance(value, Fault) else None,
)
def test_every_failure_of_a_download_is_one_sentence(
    fault: Fault,
    sentence: str,
    command: Command,
    hub: Hub,
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts
    monkeypatch.setattr(talking, "PATIENCE", 1.0)
    put(hub, "me/small", quantized)
    hub.faults.append(Fault(**vars(fault)))
    ended = command("inspect", "me/small", "-q")
    assert_one_sentence(ended, 1, sentence)
    assert hub.token not in ended.err


def test_a_disk_that_is_full_is_not_laid_on_the_hub(
    command: Command, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    def full(*words: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert_one_sentence(command("inspect", "me/small", "-q"), 1, "The disk is full")


def test_a_repository_of_gguf_files_is_told_by_its_name(
    command: Command, hub: Hub, quantized: Path, tmp_path: Path
):
    made = tmp_path / "made"
    words = ["export", quantized, "--format", "gguf", "-o", made, "--no-verify", "-q"]
    assert command(*words).code == 0
    assert_one_sentence(command("inspect", made), 2, f"holds a GGUF file; give '{made / 'made.gguf'}'")
    (made / "compression.json").rename(made / "made.gguf.compression.json")
    put(hub, "me/small", made)
    for name, words in (("inspect", "'hf download me/small FILE.gguf'"), ("compare", "no evaluation of it")):
        ended = command(name, "me/small", "-q")
        assert_one_sentence(ended, 2, words)
        assert "The hub model 'me/small' has no " in ended.err
        assert "snapshots" not in ended.err


def test_a_name_that_leaves_the_folder_is_refused(
    command: Command, hub: Hub, quantized: Path, tmp_path: Path
):
    put(hub, "me/small", quantized)
    hub.repositories["me/small"].files()["../../../../escaped.json"] = Blob(b"{}", False)
    assert_one_sentence(command("inspect", "me/small", "-q"), 1, "the hub's answer is not what was asked for")
    assert not list(tmp_path.rglob("escaped*"))
