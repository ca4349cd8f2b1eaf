"""Models on the hub as arguments of every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ...hub_server import Blob, Hub, Repository
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
