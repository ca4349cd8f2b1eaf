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

from compress.storage.lineage import Lineage, read_lineage
from compress.storage.writer import write_tensors

from .house import House, check_whole, left_behind


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), layers=10)


# A process that has imported everything forks one process a run: what is killed is a real command, but its
# start takes no seconds.
SERVER = """
import json, os, signal, sys
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import compress.commands.run, compress.pipeline.run
import compress.pruning.replaceme, compress.quantization.round_to_nearest
from compress.__main__ import main
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


def wait_for(path: Path, command: Command) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, command.stderr
        time.sleep(0.002)


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
    assert "go on where they were when given again" in command.complaint
    assert not output.exists()
    assert left_behind(output) == [".out.partial"]

    other = ("run", house.recipe, "-o", output, "--set", "steps.0.epochs=3")
    for choice in ([], ["--resume"]):
        refused = commands.run(*other, *choice)
        assert refused.code == 2
        assert "holds an interrupted run with another recipe; use --fresh" in refused.complaint
        assert left_behind(output) == [".out.partial"]

    assert commands.run("run", house.recipe, "-o", output).code == 0
    check_whole(output, unbroken)
    assert [step.resumed for step in read_lineage(output).steps] == [True, False]
    assert left_behind(output) == []


def test_terminated_and_resumed(house: House, commands: Commands, unbroken: Lineage, tmp_path: Path):
    output = tmp_path / "out"
    command = commands.start("run", house.recipe, "-o", output)
    wait_for(tmp_path / ".out.partial" / "0-replaceme" / "distances" / "progress.json", command)
    command.send(signal.SIGTERM)
    command.send(signal.SIGTERM)
    assert command.wait() == 143
    assert "Terminated; run, unlearn, prune, quantize" in command.complaint
    assert left_behind(output) == [".out.partial"]
    assert commands.run("run", house.recipe, "-o", output).code == 0
    check_whole(output, unbroken)
    assert [step.resumed for step in read_lineage(output).steps] == [True, False]


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
    for name, message in (("used", "is not empty"), ("file", "not a folder"), ("link", "is not empty")):
        command = commands.run("run", house.recipe, "-o", tmp_path / name)
        assert command.code == 2
        assert message in command.complaint
    for output, message in (
        (house.model.parent, "holds something other than a model"),
        (house.model, "holds the model to compress"),
    ):
        inside = commands.run("run", house.recipe, "-o", output, "--overwrite")
        assert inside.code == 2
        assert message in inside.complaint
    assert (tmp_path / "used" / "precious.txt").read_text() == "mine"
    assert left_behind(tmp_path / "used") == ["file", "link"]
    assert left_behind(house.model) == ["recipe.yaml", "text.txt"]
