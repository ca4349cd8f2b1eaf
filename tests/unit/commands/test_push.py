"""Pushing to a hub over HTTP, and what is said when that fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils.logging import set_verbosity_debug

from compress.report.card import Base, base_of
from compress.sources.find import find_model
from compress.storage.lineage import Exported, Lineage, Verification, read_lineage
from compress.system import hub as talking

from ...hub_server import Blob, Fault, Hub, Repository
from .common import Command, Ended, assert_one_sentence

MIT = ["--license", "mit"]


@pytest.fixture
def artefact(quantized: Path, tmp_path: Path) -> Path:
    """A quantized model, with a second file of weights, to be pushed."""
    folder = Path(shutil.copytree(quantized, tmp_path / "models" / "small"))
    (folder / "more.safetensors").write_bytes(b"0123456789" * 1000)
    record(folder, files={"more.safetensors": sha256(folder / "more.safetensors")})
    return folder


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record(folder: Path, files: dict[str, str] | None = None, **changes: Any) -> Lineage:
    """Change the record of a model."""
    lineage = read_lineage(folder)
    assert lineage is not None
    lineage = lineage.model_copy(update=changes)
    lineage.result.files.update(files or {})
    (folder / "compression.json").write_text(lineage.model_dump_json(indent=2))
    return lineage


def in_a_process(hub: Hub, home: Path, *words: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", *map(str, words)],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_what_is_pushed_comes_back_with_the_same_hashes(hub: Hub, artefact: Path, tmp_path: Path):
    words = ["push", artefact, "me/small", *MIT, "--message", "first", "--json", "-v", "--debug"]
    out, err = (process := in_a_process(hub, tmp_path / "home", *words)).communicate(timeout=60)
    assert process.returncode == 0, err
    assert hub.token not in out + err
    pushed = json.loads(out)
    repository = hub.repositories["me/small"]
    assert (repository.private, pushed["private"], pushed["unchanged"]) == (True, True, False)
    assert repository.messages == ["initial commit", "first"]
    assert pushed["commit"] == repository.branches["main"]
    assert {name: blob.sha256 for name, blob in repository.files().items() if name[0] != "."} == pushed[
        "files"
    ]
    found = find_model("me/small")
    assert found.revision == pushed["commit"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256(found.folder / name) == sha256(artefact / name) == pushed["files"][name]


def test_what_is_there_is_not_uploaded_again_nor_replaced_unasked(command: Command, hub: Hub, artefact: Path):
    assert command("push", artefact, "me/small", *MIT).code == 0
    again = command("push", artefact, "me/small", *MIT)
    assert again.code == 0
    assert "has this model already" in again.out
    record(artefact, name="renamed")
    (artefact / "more.safetensors").unlink()
    lineage = record(artefact)
    del lineage.result.files["more.safetensors"]
    (artefact / "compression.json").write_text(lineage.model_dump_json())
    refused = command("push", artefact, "me/small", *MIT, "-q")
    assert refused.code == 2
    card, sentence = refused.err.splitlines()
    assert card.endswith(f"'{artefact / 'README.md'}' differs.")
    assert "exists already and holds 9 files in 'main'; --overwrite" in sentence
    assert command("push", artefact, "me/small", *MIT, "--overwrite").code == 0
    assert "more.safetensors" not in hub.repositories["me/small"].files()
    assert b"# renamed" in hub.repositories["me/small"].files()["README.md"].content
    assert hub.asked("PUT ") == 2  # once each, and never again


def test_a_branch_is_made_and_leaves_main_as_it_was(command: Command, hub: Hub, artefact: Path):
    assert command("push", artefact, "me/small", *MIT).code == 0
    before = hub.repositories["me/small"].files()
    record(artefact, name="other")
    done = command("push", artefact, "me/small", *MIT, "--revision", "bits/4")
    assert done.code == 0, done.err
    repository = hub.repositories["me/small"]
    assert repository.files() == before
    assert b"# other" in repository.files("bits/4")["README.md"].content
    assert find_model("me/small", "bits/4").revision == repository.branches["bits/4"]


def pushed(command: Command, artefact: Path, *words: str, name: str = "me/small") -> Ended:
    return command("push", artefact, name, *MIT, "-q", *words)


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        (Fault("GET /api/models", 401, 9, words="Invalid credentials in Authorization header"), 2, "token"),
        (Fault("POST /api/repos/create", 409), 2, "The name 'me/small' is taken"),
        (
            Fault("POST /api/repos/create", 403, words="Read only"),
            2,
            "may not write to 'me/small' (Read only)",
        ),
        (
            Fault("POST /api/repos/create", 503),
            1,
            "stopped while creating the repository, because the hub answ",
        ),
        (
            Fault("PUT /storage", 500, 99),
            1,
            "uploading 'model.safetensors', because the hub answered with an",
        ),
        (Fault("PUT /storage", 0, 99), 1, "uploading 'model.safetensors', because the connection to the hub"),
        (Fault("POST .*/commit/", 502), 1, "stopped while publishing what was uploaded"),
        (Fault("POST .*/commit/", 0), 1, "what has arrived is kept"),
        (Fault("POST .*/commit/", 429), 1, "no more requests for a while"),
        (Fault("POST /api/repos/create", seconds=3), 1, "because the hub did not answer within"),
        (Fault("GET /api/models", 200), 1, "the hub's answer is not what was asked for (KeyError: 'id')"),
        (Fault("GET .*/tree/", 200, 9), 1, "while reading the repository, because the hub's answer is not"),
        (Fault("POST .*/commit/", 200), 1, "the hub's answer is not what was asked for (KeyError"),
        (
            Fault("PUT /storage", 403, 9, words="Request has expired"),
            1,
            "the hub answered with an error (403: Request has expired); run the same command again",
        ),
    ],
    ids=lambda value: value.request if isinstance(value, Fault) else None,
)
@pytest.mark.parametrize("loud", [False, True])
def test_every_failure_is_one_sentence_without_the_token(
    fault: Fault,
    code: int,
    sentence: str,
    loud: bool,
    command: Command,
    hub: Hub,
    artefact: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts
    monkeypatch.setattr(talking, "PATIENCE", 1.0)
    hub.faults.append(Fault(**vars(fault)))
    if loud:
        set_verbosity_debug()
        ended = command("push", artefact, "me/small", *MIT, "-v", "--debug")
        assert ended.code == code
        assert hub.token not in ended.out + ended.err
        assert "X-Amz-Signature=signed" not in ended.out + ended.err
        assert sentence in ended.err.strip().splitlines()[-1]
    else:
        assert_one_sentence(pushed(command, artefact), code, sentence)
    commits = hub.repositories["me/small"].messages if "me/small" in hub.repositories else []
    assert len(commits) <= 1  # nothing of the model is to be seen


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_" + "z" * 34, "The hub does not accept the access token"),
        ("hf_" + "z" * 20 + "\u00e9", "The access token of the hub has characters that no token has"),
        ("", "There is no access token for the hub"),
    ],
)
def test_a_token_that_does_not_work(
    token: str, sentence: str, command: Command, hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    ended = pushed(command, artefact)
    assert_one_sentence(ended, 2, sentence)
    assert not token or token not in ended.err
    assert hub.repositories == {}


def test_a_hub_that_is_not_there(command: Command, hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_one_sentence(pushed(command, artefact), 1, "the hub cannot be reached (http://127.0.0.1:9)")


def test_a_broken_upload_goes_on_where_it_was(
    command: Command, hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    oid = sha256(artefact / "more.safetensors")
    hub.faults.append(Fault(f"PUT /storage/{oid}", 0, 99))
    assert_one_sentence(pushed(command, artefact), 1, "uploading 'more.safetensors'")
    assert hub.repositories["me/small"].messages == ["initial commit"]
    hub.faults.clear()
    hub.log.clear()
    assert pushed(command, artefact).code == 0
    assert hub.asked("PUT ") == 1  # model.safetensors had arrived
    assert hub.repositories["me/small"].files()["more.safetensors"].sha256 == oid


def test_a_connection_that_breaks_once_and_a_slow_hub_are_waited_for(
    command: Command, hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults += [
        Fault("PUT ", 0, 1),
        Fault("POST .*/preupload", 503, 2),
        Fault("POST .*/commit", seconds=0.5),
    ]
    assert pushed(command, artefact).code == 0


def test_ctrl_c_ends_an_upload_and_the_next_push_goes_on(hub: Hub, artefact: Path, tmp_path: Path):
    hub.faults.append(Fault("PUT ", seconds=60))
    words = ["push", artefact, "me/small", *MIT]
    process = in_a_process(hub, tmp_path / "home", *words, "-q")
    while not hub.asked("PUT "):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.strip().count("\n")) == (130, "", 0), err
    assert err.strip().startswith("Error: Interrupted; ")
    assert hub.repositories["me/small"].messages == ["initial commit"]
    again = in_a_process(hub, tmp_path / "home", *words, "-q")
    assert (again.communicate(timeout=60), again.returncode)[1] == 0


@pytest.mark.parametrize(
    ("there", "words", "sentence"),
    [
        (True, ["--public"], "'me/small' is private; make it public on its page first"),
        (False, [], "'me/small' is public; add --public"),
    ],
)
def test_nothing_becomes_public_unasked(
    there: bool, words: list[str], sentence: str, command: Command, hub: Hub, artefact: Path
):
    hub.repositories["me/small"] = Repository(private=there)
    hub.repositories["me/small"].commit("main", {}, "initial commit")
    assert_one_sentence(pushed(command, artefact, *words), 2, sentence)
    assert pushed(command, artefact, "--public", name="me/seen").code == 0
    assert not hub.repositories["me/seen"].private


def lose(folder: Path) -> None:
    (folder / "more.safetensors").unlink()


def alter(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")


def pickle(folder: Path) -> None:
    (folder / "more.bin").write_bytes(b"x")
    record(folder, files={"more.bin": sha256(folder / "more.bin")})


def leak(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(f"model: x\nsteps: []\ntoken: hf_{'q' * 34}\n")


def forget(folder: Path) -> None:
    (folder / "compression.json").unlink()


def shard(folder: Path) -> None:
    (folder / "s3t").mkdir()
    (folder / "s3t" / "state.json").write_text("{}")


def escape(folder: Path) -> None:
    record(folder, files={"../secret.json": "0" * 64})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lose, "is missing"),
        (alter, "has changed since the model was written"),
        (pickle, "'more.bin' is not pushed"),
        (leak, "holds what looks like an access token"),
        (forget, "was not written by compress-model"),
        (escape, "outside of its folder"),
        (shard, "is an ensemble that S3T trained"),
        (lambda folder: (folder / "recipe.yaml").write_text("steps: [1"), "recipe.yaml is damaged"),
        (lambda folder: (folder / "recipe.yaml").write_text("steps: 5"), "recipe.yaml is damaged"),
    ],
)
def test_what_is_not_pushed(
    change: Callable[[Path], None], sentence: str, command: Command, hub: Hub, artefact: Path
):
    change(artefact)
    assert_one_sentence(pushed(command, artefact), 2, sentence)
    assert hub.log == []


def test_importances_are_no_model(command: Command, hub: Hub, artefact: Path):
    found = Exported(
        target="imatrix", options={}, notes=[], verification=Verification(runtime="its quantizer", tokens=0)
    )
    record(artefact, exported=found)
    assert_one_sentence(pushed(command, artefact), 2, "holds importances and no model")
    assert hub.log == []


@pytest.mark.parametrize("name", ["", " "])
def test_a_branch_without_a_name_is_not_taken_for_main(name: str, command: Command, hub: Hub, artefact: Path):
    assert_one_sentence(pushed(command, artefact, f"--revision={name}"), 2, "The name of the branch is empty")
    assert hub.log == []


@pytest.mark.parametrize("name", ["small", "me/you/small", "me/sm all", "me/", "me/-small"])
def test_a_name_that_is_none(name: str, command: Command, hub: Hub, artefact: Path):
    assert_one_sentence(pushed(command, artefact, name=name), 2, f"'{name}'")


def test_the_licence_of_the_base_model_is_carried_over(command: Command, hub: Hub, artefact: Path):
    parent = read_lineage(artefact).parent.model_copy(update={"id": "org/base", "revision": "0" * 40})
    record(artefact, parent=parent)
    assert_one_sentence(
        command("push", artefact, "me/small", "-q"), 2, "The licence of 'org/base' is not known; look it up"
    )
    record(artefact, card={"license": "other", "license_link": "LICENSE", "tags": ["fun"]})
    assert_one_sentence(pushed(command, artefact), 2, "'org/base' is under the licence other, which holds")
    assert command("push", artefact, "me/small", "-q").code == 0
    card = hub.repositories["me/small"].files()["README.md"].content
    assert front_matter(card) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_link": "https://huggingface.co/org/base/blob/main/LICENSE",
        "tags": ["fun", "compress-model", "quantization"],
    }
    for heading in (b"## What was done", b"## Limits", b"## Papers", b"## Recipe", b"**Loads with:**"):
        assert heading in card
    assert b"https://arxiv.org/abs/" in card


def test_a_licence_that_the_hub_does_not_know(command: Command, hub: Hub, artefact: Path):
    ended = command("push", artefact, "me/small", "-q", "--license", "not-a-license")
    assert_one_sentence(ended, 2, '"license" must be one of')
    assert hub.repositories == {}


def test_paths_of_this_machine_and_foreign_files_stay_here(
    command: Command, hub: Hub, artefact: Path, tiny: Path
):
    (artefact / "notes.txt").write_text("mine")
    (artefact / ".env").write_text("SECRET=1")
    ended = command("push", artefact, "me/small", *MIT)
    assert "Not pushed, because the record of the model does not list it: '.env', 'notes.txt'." in ended.err
    files = hub.repositories["me/small"].files()
    assert not {"notes.txt", ".env"} & files.keys()
    for name in ("compression.json", "recipe.yaml", "README.md"):
        assert str(tiny.parent).encode() not in files[name].content, name
    assert json.loads(files["compression.json"].content)["parent"]["id"] == tiny.name


def test_a_gguf_file_is_pushed_with_its_card_beside_others(
    command: Command, hub: Hub, artefact: Path, tmp_path: Path
):
    file = tmp_path / "small-q4.gguf"
    file.write_bytes(b"GGUF" + bytes(1000))
    assert_one_sentence(pushed(command, file), 2, "has no record 'small-q4.gguf.compression.json' beside it")
    lineage = record(artefact)
    lineage.result.files, lineage.result.bytes = {"small.gguf": sha256(file)}, file.stat().st_size
    lineage.exported = Exported(
        target="gguf",
        options={},
        notes=["The head has 6 bits."],
        verification=Verification(runtime="llama-cpp-python 0.3", kl=0.01, tokens=99),
    )
    lineage.reload = None
    file.with_name(f"{file.name}.compression.json").write_text(lineage.model_dump_json())
    hub.repositories["me/small"] = Repository(private=True)
    hub.repositories["me/small"].commit("main", {"other.gguf": Blob(b"GGUF", True)}, "initial commit")
    assert_one_sentence(pushed(command, file), 2, "--overwrite")
    assert pushed(command, file, "--overwrite").code == 0
    files = hub.repositories["me/small"].files()
    assert files.keys() == {"other.gguf", "small-q4.gguf", "small-q4.gguf.compression.json", "README.md"}
    assert files["small-q4.gguf"].sha256 == sha256(file)
    published = json.loads(files["small-q4.gguf.compression.json"].content)
    assert published["name"] == "small-q4.gguf"  # as it is called now
    assert published["result"]["files"] == {"small-q4.gguf": sha256(file)}
    card = files["README.md"].content
    assert front_matter(card)["library_name"] == "gguf"
    assert b"Verified with llama-cpp-python 0.3" in card
    assert b"`small-q4.gguf.compression.json` has all options" in card
    assert b"## Recipe" not in card


def test_the_base_model_is_the_nearest_one_on_the_hub(quantized: Path):
    last = read_lineage(quantized)
    first = last.model_copy(
        update={
            "parent": last.parent.model_copy(update={"id": "org/base", "revision": "1" * 40}),
            "steps": [last.steps[0].model_copy(update={"family": "pruning"})],
        }
    )

    def made_from(**parent: Any) -> Lineage:
        return last.model_copy(update={"parent": last.parent.model_copy(update=parent)})

    assert base_of(last) is None
    assert base_of(first) == Base("org/base", "finetune")
    assert base_of(made_from(lineage=first)) == Base("org/base", "quantized")
    assert base_of(made_from(lineage=first, id="org/pruned", revision="2" * 40)) == Base(
        "org/pruned", "quantized"
    )
    for target, relation in (("nemotron-nas", "finetune"), ("onnx", "finetune"), ("gguf", "quantized")):
        found = Exported(target=target, options={}, notes=[], verification=Verification(runtime="", tokens=0))
        assert base_of(first.model_copy(update={"exported": found})) == Base("org/base", relation)
    cached = f"/root/.cache/huggingface/hub/models--org--it/snapshots/{'a' * 40}"
    assert base_of(made_from(id=cached)) == Base("org/it", "quantized")


def test_evaluations_on_the_hub_are_compared_without_its_weights(command: Command, hub: Hub, artefact: Path):
    from ..report.common import card

    record(artefact, evaluations=[card("small").model_dump(mode="json")])
    assert pushed(command, artefact).code == 0
    ended = command("compare", "me/small", "--format", "csv")
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == 2
    assert not hub.asked("GET .*safetensors")
