"""The hidden folder beside the output in which a run works, and the lock that keeps other runs out."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.errors import BadInput, CompressError
from compress.system.files import fsync, write_atomically

log = logging.getLogger(__name__)

ROOM = 1.05
"""Free disk space that a run asks for, as a multiple of the predicted bytes."""

BY_STEP = {"steps": "recipe", "records": "set of records"}
"""The parts of a fingerprint that are lists with an entry for each step -> what messages call them."""


class Workspace:
    """The work folder of the run that writes ``output``: ``.NAME.partial`` beside it.

    It holds ``run.json`` (the fingerprint of the run), a folder for each step, and at the end ``artefact``,
    which becomes the output by one rename. A file ``publishing`` says that the rename is about to happen.

    If ``output`` is a link to a folder, the work lies beside that folder, where the rename stays on its disk.

    Raises:
        BadInput: nothing can lie beside ``output``, because it ends in no name (``/``, ``..``), is a disk of
            its own, or lies in a folder that cannot be written.
    """

    def __init__(self, output: Path) -> None:
        if output.name in ("", ".."):
            raise BadInput(f"The output '{output}' does not end in a folder's name; use another -o.")
        if output.is_symlink() and output.is_dir():
            output = output.resolve()
        if os.path.ismount(output):
            raise BadInput(f"The output '{output}' is a whole disk; name a folder on it with -o.")
        there = next(parent for parent in output.absolute().parents if parent.exists())
        if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
            raise BadInput(f"The output '{output}' cannot be created, because '{there}' cannot be written.")
        self.output = output
        self.folder = output.with_name(f".{output.name}.partial")

    @property
    def artefact(self) -> Path:
        """The folder in which the result is assembled."""
        return self.folder / "artefact"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from the output. The lock ends with the process, however that ends.

        Raises:
            BadInput: another run holds the lock.
        """
        lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise BadInput(
                f"Another run is writing to '{self.output}'; wait for it, or use another -o."
            ) from None
        try:
            yield
        finally:
            # While it is still ours: afterwards the file may be another run's.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def tidy(self) -> None:
        """Clean up after a run that was killed in its first or last moments."""
        recover(self.output)
        published = (self.folder / "publishing").exists() and not self.artefact.exists()
        if published or not (self.folder / "run.json").exists():
            self.discard()

    def discard(self) -> None:
        """Remove the work folder. After a kill half-way, the rest no longer counts as an interrupted run."""
        (self.folder / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def enter(self, fingerprint: dict[str, Any]) -> None:
        """Create the work folder, or return to the one of an interrupted run.

        Args:
            fingerprint: an interrupted run continues only if all of this is the same. ``steps`` and
                ``records`` are lists, of which only the steps that were begun have to be.

        Raises:
            BadInput: the interrupted run was another one.
        """
        path = self.folder / "run.json"
        if path.exists():
            before = json.loads(path.read_text())
            begun = len(list(self.folder.glob("[0-9]*-*")))
            for key in BY_STEP:
                if before.get(key, [])[:begun] == fingerprint.get(key, [])[:begun]:
                    before[key] = fingerprint.get(key)
            changed = {
                BY_STEP.get(key, key) for key, value in fingerprint.items() if before.get(key) != value
            }
            if changed:
                raise BadInput(
                    f"'{self.folder}' holds an interrupted run with another {' and '.join(sorted(changed))}; "
                    "use --fresh to throw it away, or another -o."
                )
            log.info("Continuing the interrupted run in %s.", self.folder)
            write_atomically(path, json.dumps(fingerprint))
            return
        self.discard()
        self.folder.mkdir()
        write_atomically(path, json.dumps(fingerprint))

    def check_disk(self, nbytes: int) -> None:
        """Refuse to start if the disk has less than ``nbytes`` and a little more.

        Raises:
            CompressError: there is too little room. What an interrupted run takes already counts as free.
        """
        wanted = int(ROOM * nbytes)
        taken = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.folder.parent).free + taken
        if free < wanted:
            raise CompressError(
                f"The disk of '{self.folder.parent}' has {free / 1e6:,.0f} MB free, but this run needs about "
                f"{wanted / 1e6:,.0f} MB; free some space or write the result to another disk."
            )

    def clear_artefact(self) -> None:
        """Remove what an interrupted run had assembled."""
        (self.folder / "publishing").unlink(missing_ok=True)
        shutil.rmtree(self.artefact, ignore_errors=True)

    def publish(self) -> None:
        """Rename the artefact to the output, and remove the work folder."""
        (self.folder / "publishing").touch()  # with this and without the artefact, the run is over
        publish(self.artefact, self.output)
        self.discard()


def publish(work: Path, output: Path) -> None:
    """Rename the finished folder ``work`` to ``output``, replacing an old ``output``.

    Raises:
        CompressError: it cannot be renamed; an old ``output`` is then still in its place.
    """
    for path in (*work.rglob("*"), work):
        fsync(path)
    old = _old(output)
    try:
        if output.exists():
            output.rename(old)
        work.rename(output)
    except OSError as error:
        recover(output)
        raise CompressError(
            f"The finished model could not be moved to '{output}': {error.strerror}."
        ) from error
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """Undo or finish a `publish` that was killed between its two renames."""
    old = _old(output)
    if not output.exists() and old.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")
