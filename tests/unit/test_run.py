"""Runs through the command line: killed, interrupted, resumed, refused, out of disk; nothing by halves."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from compress import artefact, evaluate, workspace
from compress import run as module
from compress.artefact import Lineage, read_lineage
from compress.calibration.windows import evaluation_windows
from compress.checkpoint import Checkpoint, write_tensors
from compress.errors import BadInput, CompressError
from compress.files import file_sha256
from compress.models import find_model, load_tokenizer
from compress.recipe import parse_recipe
from compress.run import execute
from compress.workspace import Workspace

WORDS = 200
STEPS = [
    {"method": "replaceme", "layers": 3, "epochs": 2, "held_out": 0.0},
    {"method": "rtn", "bits": 4, "group_size": 32},
]


class House:
    """A folder with a tiny model, a text and a recipe."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.model, self.text, self.recipe = folder / "model", folder / "text.txt", folder / "recipe.yaml"
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=WORDS + 2,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        hf.LlamaForCausalLM(config).save_pretrained(self.model)
        words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
        core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
        ).save_pretrained(self.model)
        choose = random.Random(0)
        documents = (" ".join(f"w{choose.randrange(WORDS)}" for _ in range(130)) for _ in range(30))
        self.text.write_text("\n\n".join(documents))
        self.recipe.write_text(yaml.safe_dump(self.data()))

    def data(self, steps: list[dict[str, Any]] = STEPS, **more: Any) -> dict[str, Any]:
        calibration = {"source": str(self.text), "nsamples": 16, "seqlen": 64}
        return {"model": str(self.model), "calibration": calibration, "steps": steps, **more}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), layers=10)


# A process that has imported everything forks one process a run: what is killed is a real command, but its
# start takes no seconds.
SERVER = """
import json, os, signal, sys
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import compress.commands.run, compress.run
import compress.pruning.replaceme, compress.quantization.round_to_nearest
from compress.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        code = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        print(code, flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        for number, name in enumerate((os.devnull, *request["logs"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.argv = ["compress-model", *request["arguments"]]
        main()
    print(pid, flush=True)
"""


class Command:
    """A running ``compress-model``."""

    def __init__(self, server: subprocess.Popen[str], logs: Path, arguments: list[str]) -> None:
        self.server = server
        self.logs = [logs / "stdout", logs / "stderr"]
        self.pid = self._ask({"logs": list(map(str, self.logs)), "arguments": arguments})

    def _ask(self, request: Any) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self._ask(self.pid)

    @property
    def stderr(self) -> str:
        return self.logs[1].read_text()

    @property
    def complaint(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0]


class Commands:
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *arguments: Any) -> Command:
        self.count += 1
        logs = self.folder / str(self.count)
        logs.mkdir()
        return Command(self.server, logs, [str(argument) for argument in arguments])

    def run(self, *arguments: Any) -> Command:
        command = self.start(*arguments)
        command.code = command.wait()
        return command


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    found = Commands(tmp_path_factory.mktemp("logs"))
    yield found
    found.server.stdin.close()
    found.server.wait()


@pytest.fixture(scope="module")
def unbroken(house: House, tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """What the real command, in a process of its own, makes of the recipe."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compress", "run", house.recipe, "-o", output, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    lineage = read_lineage(output)
    assert json.loads(done.stdout) == lineage.model_dump(mode="json")
    assert left_behind(output) == []
    assert not any(step.resumed for step in lineage.steps)
    return lineage


def left_behind(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path != output)


def wait_for(path: Path, command: Command) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, command.stderr
        time.sleep(0.002)


def check_whole(output: Path, wanted: Lineage) -> None:
    lineage = read_lineage(output)
    assert lineage.result.files == wanted.result.files
    for name, sha256 in wanted.result.files.items():
        assert file_sha256(output / name) == sha256
    assert {"README.md", "recipe.yaml", "compression.json"} < {file.name for file in output.iterdir()}


def test_killed_at_ten_moments_and_resumed(
    house: House, commands: Commands, unbroken: Lineage, tmp_path: Path
):
    output = tmp_path / "out"
    run = ("run", house.recipe, "-o", output, "--resume")
    began = time.monotonic()
    assert commands.run(*run).code == 0
    length = time.monotonic() - began
    check_whole(output, unbroken)
    shutil.rmtree(output)

    choose = random.Random(0)
    moments = [length * (part + choose.random()) / 10 for part in range(10)]
    choose.shuffle(moments)
    interrupted = 0
    for moment in moments:
        command = commands.start(*run)
        time.sleep(moment)
        command.send(signal.SIGKILL)
        code = command.wait()
        assert code in (0, -signal.SIGKILL), command.stderr
        if output.exists():
            check_whole(output, unbroken)
            shutil.rmtree(output)
        else:
            assert code == -signal.SIGKILL
            interrupted += (tmp_path / ".out.partial" / "run.json").exists()
    assert interrupted >= 3

    assert commands.run(*run).code == 0
    check_whole(output, unbroken)
    assert left_behind(output) == []


def test_interrupted_and_resumed(house: House, commands: Commands, unbroken: Lineage, tmp_path: Path):
    output = tmp_path / "out"
    command = commands.start("run", house.recipe, "-o", output)
    wait_for(tmp_path / ".out.partial" / "0-replaceme" / "distances" / "progress.json", command)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert "go on from the last finished layer" in command.complaint
    assert not output.exists()
    assert left_behind(output) == [".out.partial"]

    other = ("run", house.recipe, "-o", output, "--set", "steps.1.bits=8")
    for choice in ([], ["--resume"]):
        refused = commands.run(*other, *choice)
        assert refused.code == 2
        assert "holds an interrupted run with another recipe; use --fresh" in refused.complaint
        assert left_behind(output) == [".out.partial"]

    assert commands.run("run", house.recipe, "-o", output).code == 0
    check_whole(output, unbroken)
    assert [step.resumed for step in read_lineage(output).steps] == [True, False]
    assert left_behind(output) == []


def test_fresh_throws_the_interrupted_run_away(
    house: House, commands: Commands, unbroken: Lineage, tmp_path: Path
):
    output = tmp_path / "out"
    command = commands.start("run", house.recipe, "-o", output, "--set", "steps.0.layers=2")
    wait_for(tmp_path / ".out.partial" / "0-replaceme" / "distances" / "progress.json", command)
    command.send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert commands.run("run", house.recipe, "-o", output, "--fresh").code == 0
    check_whole(output, unbroken)
    assert not any(step.resumed for step in read_lineage(output).steps)
    assert left_behind(output) == []


def test_two_runs_at_once(house: House, commands: Commands, unbroken: Lineage, tmp_path: Path):
    output = tmp_path / "out"
    first = commands.start("run", house.recipe, "-o", output)
    wait_for(tmp_path / ".out.partial" / "run.json", first)
    first.send(signal.SIGSTOP)
    try:
        for _ in range(2):  # the first refusal must not have taken the lock away
            second = commands.run("run", house.recipe, "-o", output, "--fresh")
            assert second.code == 2
            assert f"Another run is writing to '{output}'" in second.complaint
            assert left_behind(output) == [".out.lock", ".out.partial"]
    finally:
        first.send(signal.SIGCONT)
    assert first.wait() == 0
    check_whole(output, unbroken)
    assert left_behind(output) == []


def test_disk_full(house: House, commands: Commands, unbroken: Lineage, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip(
            "a small disk cannot be mounted here (that needs root): what happens on a full one is untested"
        )
    try:
        with pytest.raises(OSError) as caught:
            write_tensors({"large": torch.zeros(1 << 20)}, disk / "large")
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []

        output = disk / "out"
        command = commands.run("run", house.recipe, "-o", output)
        assert command.code == 1
        assert "The disk is full; free some space and run the same command again" in command.complaint
        assert left_behind(output) == [".out.partial"]
        subprocess.run([mount, "-o", "remount,size=32m", disk], check=True)
        assert commands.run("run", house.recipe, "-o", output).code == 0
        check_whole(output, unbroken)
        assert read_lineage(output).steps[0].resumed
        assert left_behind(output) == []

        (disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(disk).free - (256 << 10)))
        command = commands.run("run", house.recipe, "-o", disk / "other", "--set", "steps=[]")
        assert command.code == 1
        assert "MB free, but this run needs about" in command.complaint
        assert not (disk / "other").exists()
    finally:
        subprocess.run([shutil.which("umount"), disk], check=True)


def test_occupied_outputs(house: House, commands: Commands, tmp_path: Path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "used")
    for name, message in (("used", "is not empty"), ("file", "not a folder"), ("link", "not a folder")):
        command = commands.run("run", house.recipe, "-o", tmp_path / name)
        assert command.code == 2
        assert message in command.complaint
    for output, message in (
        (house.model.parent, "holds other things than a model"),
        (house.model, "holds the model to compress"),
    ):
        inside = commands.run("run", house.recipe, "-o", output, "--overwrite")
        assert inside.code == 2
        assert message in inside.complaint
    assert (tmp_path / "used" / "precious.txt").read_text() == "mine"
    assert left_behind(tmp_path / "used") == ["file", "link"]
    assert left_behind(house.model) == ["recipe.yaml", "text.txt"]


# In this process: what a command would do at moments that are hard to hit from outside.


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
    assert lineage.reload.loaded_by == ("compress-model, layer by layer" if steps else "transformers")


def test_bad_weights_leave_nothing(small: House, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(small.model, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # a NaN at the end of the last tensor
    (broken / "model.safetensors").write_bytes(data)
    recipe = parse_recipe(small.data(STEPS[1:]) | {"model": str(broken)})
    with pytest.raises(BadInput, match="holds NaN or infinite values"):
        execute(recipe, tmp_path / "out")
    assert left_behind(broken) == []


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
    with pytest.raises(BadInput, match=r"was calibrated on \d+ of the documents"):
        evaluate._check_not_calibrated_on(
            find_model(str(packed)), evaluation_windows(tokenizer, str(small.text), 32)
        )
    (tmp_path / "unseen.txt").write_text("w1 w2 w3 w4")
    evaluate._check_not_calibrated_on(
        find_model(str(packed)), evaluation_windows(tokenizer, str(tmp_path / "unseen.txt"), 32)
    )


def add_evaluations_quietly(folder: Path) -> None:
    """An evaluation on record, without the minutes it takes to make one."""
    lineage = read_lineage(folder)
    lineage.evaluations.append({"suite": "made up"})
    (folder / artefact.LINEAGE).write_text(lineage.model_dump_json())
