"""What the tests of the command line share: words that many commands take, and what ended commands say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RTN = ["--method", "rtn", "--group-size", "32"]
REPLACEME = ["--method", "replaceme", "--layers", "1", "--nsamples", "4", "--seqlen", "32", "--epochs", "1"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Command = Callable[..., Ended]


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_one_sentence(ended: Ended, code: int, words: str) -> None:
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("Error: ")
    assert ended.err.rstrip().endswith((".", "?"))
    assert not ended.err.rstrip().endswith("?.")
    assert words in ended.err
