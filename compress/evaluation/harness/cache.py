"""What models have answered already: finished tasks, and the single requests of one that was interrupted.

Every entry is filed under the model's hash, and its key holds that hash together with everything else that
the answer depends on. So no answer of one model is ever given for another, whatever happens to the files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from compress.system.cache import cache_folder, make_folder, not_written
from compress.system.files import atomic

Rows = list[dict[str, Any]]
"""The questions of a task, each with its answer and its scores."""

FLUSH_SECONDS = 2.0
"""Answers that are younger may be lost in a crash."""


class Finished:
    """The tasks that one model has answered when it was run in one way.

    Args:
        identity: the hash of the model under ``model``, and everything else that its answers depend on.

    Raises:
        CompressError: the cache cannot be written.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.folder = cache_folder() / "harness" / str(identity["model"])[:32]
        make_folder(self.folder)

    def find(self, asked: dict[str, Any]) -> Rows | None:
        """The rows of a task that was asked in this way before; None if it was not or they are damaged."""
        with suppress(OSError, EOFError, ValueError):
            with gzip.open(self._file(asked), "rt", encoding="utf-8") as file:
                about, *rows = map(json.loads, file)
            if about == self._about(asked, len(rows)):
                return rows
        return None

    def keep(self, asked: dict[str, Any], rows: Rows) -> None:
        """Keep the rows of a task.

        Raises:
            CompressError: they cannot be written.
        """
        lines = (self._about(asked, len(rows)), *rows)
        try:
            with atomic(self._file(asked)) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
                file.writelines(f"{as_text(line)}\n" for line in lines)
        except OSError as error:
            raise not_written(self.folder, error) from error

    def _about(self, asked: dict[str, Any], rows: int) -> dict[str, Any]:
        return {"model": self.identity, "asked": asked, "rows": rows}

    def _file(self, asked: dict[str, Any]) -> Path:
        return self.folder / f"{digest(self.identity, asked)[:32]}.jsonl.gz"


class Requests:
    """The single requests that one model has answered: what lm-eval calls a cache hook, and more.

    lm-eval has a cache of its own, whose keys leave out the model, and which is pickled.

    Args:
        folder: where to keep them.
        identity: as in `Finished`.

    Raises:
        CompressError: from any of its functions: the cache cannot be read or written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._file, self._identity = folder / "requests.sqlite", identity
        self._fresh: list[tuple[str, str]] = []
        self._flushed = time.monotonic()
        self._answers: sqlite3.Connection = self._do(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._answers.close()

    def find(self, kind: str, request: Iterable[Any]) -> Any:
        """The answer to a request, or None."""
        key = self._key(kind, request)
        row = self._do(lambda: self._answers.execute("SELECT answer FROM answers WHERE key = ?", (key,)))
        found = row.fetchone()
        return None if found is None else json.loads(found[0])

    def keep(self, kind: str, request: Iterable[Any], answer: Any) -> None:
        """Keep the answer to a request. It is on the disk after `FLUSH_SECONDS`."""
        self._fresh.append((self._key(kind, request), json.dumps(answer)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on the disk."""
        fresh, self._fresh = self._fresh, []
        self._do(lambda: self._insert(fresh))
        self._flushed = time.monotonic()

    def _insert(self, fresh: list[tuple[str, str]]) -> None:
        with self._answers:
            self._answers.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", fresh)

    def _key(self, kind: str, request: Iterable[Any]) -> str:
        return digest(self._identity, kind, list(request))

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # it is damaged
            self._file.unlink()
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, timeout=60)
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
        return connection

    def _do(self, work: Any) -> Any:
        try:
            return work()
        except sqlite3.Error as error:
            raise not_written(self._file.parent, OSError(str(error))) from error
        except OSError as error:
            raise not_written(self._file.parent, error) from error


def digest(*content: Any) -> str:
    """The sha256 of plain data."""
    return hashlib.sha256(as_text(content).encode()).hexdigest()


def as_text(content: Any) -> str:
    """Plain data as one line of JSON, always the same; what is no plain data is written as its text."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
