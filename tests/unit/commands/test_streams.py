"""Where a command's words go: streams of other encodings, readers that leave, full disks, no width."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.commands.common import progress_shown
from compress.system.streams import show_what_can_be_shown

from .common import Command

ON_LINUX = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script, in which $CM is the command."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"CM": f"{sys.executable} -m compress"} | environment,
    )


@pytest.mark.parametrize("words", ["methods", "recipes", "recipes --json", "--help"])
def test_a_reader_that_leaves_is_no_failure(words: str):
    done = bash(f"$CM {words} | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    done = bash(f"$CM {words} | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_of_stderr_that_leaves_does_not_stop_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "compress")

    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Left())
    with progress_shown() as progress:
        progress("working", 0.5)


@ON_LINUX
def test_a_full_disk_behind_stdout_is_told_in_one_sentence():
    done = bash("$CM recipes > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The disk is full;")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk"])
def test_what_an_encoding_lacks_is_replaced(encoding: str):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding)
    show_what_can_be_shown(stream)
    print("−1.5 ± 0.2 KL(dense ‖ model) 10–20 ☃", file=stream, flush=True)
    shown = file.getvalue().decode(encoding)
    assert len(shown.rstrip("\n")) == len("−1.5 ± 0.2 KL(dense ‖ model) 10–20 ☃")
    assert shown.replace("−", "-").startswith("-1.5 ")
    assert "model) 10" in shown
    assert shown.rstrip().endswith("?")


def test_tables_are_printed_in_any_encoding():
    """What is printed as it is, and a table, whose rules rich replaces itself."""
    plant = "import compress.commands.recipes as r; from compress.cli import main; import sys;"
    plant += " sys.argv = ['compress-model', 'recipes', '--json']; from rich.table import Table;"
    plant += " table = Table('±'); table.add_row('10–20');"
    plant += " r.print_json = lambda _: (print('−1 ☃'), __import__('rich').print(table)); main()"
    done = bash(f'{sys.executable} -c "{plant}"', PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("-1 ?\n+-")
    assert "10-20" in done.stdout


def test_no_columns_are_not_a_width(command: Command, monkeypatch: pytest.MonkeyPatch):
    def lines(*words: Any) -> list[str]:
        return command(*words).out.splitlines()

    usual = {words: lines(*words) for words in (("methods", "rtn"), ("recipes", "--help"))}
    monkeypatch.setenv("COLUMNS", "0")
    assert {words: lines(*words) for words in usual} == usual
    assert all(usual.values())
