"""S3T ensembles after their training: delete records, ask what is left, train again, and verify.

The state of a folder changes when ``s3t/state.json`` is replaced, in one move: a command that is killed
leaves the old state or the new one. Files that the state no longer names, which may have seen deleted
records, are removed afterwards, or by the next command if this one was killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.calibration.text.records import read_records
from compress.engine.opening import open_checkpoint
from compress.errors import BadInput, nearest
from compress.pipeline.sharded_training import Lessons, base_of, prefixes
from compress.pipeline.workspace import Workspace
from compress.storage.sharded import (
    KEY,
    STATE,
    Example,
    Shard,
    Sharded,
    prefix_sha256,
    read_examples,
    read_sharded,
    served_files,
    stage_folder,
    write_examples,
    write_sharded,
)
from compress.system.device import check_device, computing_on
from compress.system.files import file_sha256, write_atomically
from compress.system.progress import Progress
from compress.unlearning.parts.orders import expected_deletions, first_slices, live_length
from compress.unlearning.parts.stages import kind_of, machine, reproducible
from compress.unlearning.s3t import S3T, again, served, without

log = logging.getLogger(__name__)

RETRAINING = "retraining"
"""The folder in ``s3t/`` in which exhausted shards are trained again."""


def _silent(text: str, share: float) -> None:
    """Report progress to nobody."""


def budget(folder: Path) -> dict[str, Any]:
    """What can still be deleted from an ensemble, as JSON data.

    ``shards`` has for each shard its live prefixes, what it serves, and ``sure``: the number of slices that
    can be deleted, whichever they are, before it must be trained again. ``expected_deletions`` are the mean
    numbers of records that can be deleted, in a random order, until the first shard that is not exhausted
    must be trained again, and until all must.

    Raises:
        BadInput: the folder was not written by S3T, or is damaged.
    """
    state = read_sharded(folder)
    shards, firsts = [], []
    for number, shard in enumerate(state.shards):
        left = first_slices(shard.orders, shard.dead)
        if left:
            firsts.append([len(shard.slices[slice_]) for slice_ in left])
        shards.append(
            {
                "shard": number,
                "trained": shard.generation + 1,
                "records": shard.remaining,
                "slices": len(shard.slices),
                "dead": shard.dead,
                "orders": [
                    {"order": order, "live": live_length(order, shard.dead)} for order in shard.orders
                ],
                "served": shard.served.model_dump(),
                "sure": max(0, len(left) - 1),
                "exhausted": not left,
            }
        )
    records = sum(shard.remaining for shard in state.shards)
    first, last = expected_deletions(firsts, records)
    return {
        "folder": str(folder),
        "records": records,
        "deleted": len(state.deleted),
        "shards": shards,
        "expected_deletions": {"first_shard": round(first, 1), "all_shards": round(last, 1)},
        "receipt": receipt(state),
    }


def receipt(state: Sharded) -> str:
    """The sha256 of everything that an ensemble serves, made of those of its shards."""
    return prefix_sha256([shard.served.sha256 for shard in state.shards])


def delete(folder: Path, ids: Sequence[str], forget: str | None = None) -> dict[str, Any]:
    """Delete records from an ensemble. Nothing is trained; it takes as long as removing files.

    Args:
        folder: of the ensemble.
        ids: of records.
        forget: a set of records, which are found by their words.

    Returns:
        JSON data: the ids, the slices that died, the shards that are exhausted now, those of them that have
        no records left (``empty``), and the new receipt.

    Raises:
        BadInput: a record is not in the training data, was deleted before, or is named twice; nothing
            changes then.
    """
    with _changing(folder) as state:
        examples = read_examples(folder, state)
        wanted = list(ids) + (_found(forget, examples, state) if forget is not None else [])
        _check_ids(wanted, examples, state)
        gone = set(wanted)
        _warn_of_copies(gone, examples)
        shards = [without(shard, gone) for shard in state.shards]
        generation = int(state.examples.removeprefix("records-").removesuffix(".jsonl")) + 1
        new = state.model_copy(
            update={
                "shards": shards,
                "deleted": [*state.deleted, *wanted],
                "examples": f"records-{generation}.jsonl",
                "priors": state.priors and {n: p for n, p in state.priors.items() if n not in gone},
            }
        )
        # What was trained again before this, but not finished, has seen these records.
        shutil.rmtree(folder / KEY / RETRAINING, ignore_errors=True)
        left = (example for name, example in examples.items() if name not in gone)
        write_examples(folder / KEY / new.examples, left)
        write_sharded(folder, new)
        _tidy(folder, new)
    return {
        "folder": str(folder),
        "deleted": wanted,
        "slices": [
            {"shard": number, "slice": slice_}
            for number, (before, after) in enumerate(zip(state.shards, shards, strict=True))
            for slice_ in sorted({*after.dead} - {*before.dead})
        ],
        "exhausted": _exhausted(new),
        "empty": [number for number in _exhausted(new) if not new.shards[number].remaining],
        "receipt": receipt(new),
    }


def retrain(folder: Path, device: str = "cpu", progress: Progress = _silent) -> dict[str, Any]:
    """Train the shards whose orders are all exhausted again, on what is left of their records.

    A shard without any records stays left out. A killed run goes on with the first stage that is missing.

    Returns:
        JSON data: the shards that were trained, and the new receipt.

    Raises:
        BadInput: no shard is exhausted, no exhausted shard has records left, or a killed run began on another
            kind of machine.
        CompressError: the training diverged.
    """
    check_device(device)
    _check_peft()
    with _changing(folder) as state:
        numbers = _exhausted(state)
        if not numbers:
            raise BadInput(f"No shard of '{folder}' is exhausted, so there is nothing to train again.")
        numbers = [number for number in numbers if state.shards[number].remaining]
        if not numbers:
            raise BadInput(f"The exhausted shards of '{folder}' have no records left to train on.")
        options = S3T.Options(**state.options)
        new = state.model_copy(deep=True)
        for number in numbers:
            new.shards[number] = again(state.shards[number], state.priors, options)
        work = folder / KEY / RETRAINING
        with computing_on(device):
            total = sum(len(prefixes(new.shards[number].orders)) for number in numbers)
            lessons = _lessons(folder, new, work / "work", device, progress, total)
            _enter(work, kind_of(machine(device)))
            for number in numbers:
                shard = new.shards[number]
                shard.machine = _here(device, shard)
                with reproducible(shard.machine["threads"]):
                    shard.stages = lessons.train(number, shard, work)
                shard.served = served(shard)
        for number in numbers:
            name = stage_folder(number, new.shards[number].generation)
            shutil.copytree(work / name, folder / KEY / name, dirs_exist_ok=True)
        write_sharded(folder, new)
        shutil.rmtree(work)
        _tidy(folder, new)
    return {"folder": str(folder), "trained": numbers, "receipt": receipt(new)}


def verify(folder: Path, device: str = "cpu", progress: Progress = _silent) -> dict[str, Any]:
    """Train what an ensemble serves once more, without any deleted slice, and compare it bit for bit.

    Returns:
        JSON data: ``holds``, and for each shard that serves something ``recorded`` (the receipt), ``stored``
        (of the files that are served) and ``trained`` (of the new training; None where nothing is left to
        train on), and whether they agree. ``elsewhere`` says in what this machine differs from the one of the
        shard's training, if it does, because then the last bits may differ as well.

    Raises:
        BadInput: the folder was not written by S3T, is damaged, or its base model was changed.
        CompressError: the training diverged.
    """
    check_device(device)
    _check_peft()
    state = read_sharded(folder)
    numbers = [number for number, shard in enumerate(state.shards) if shard.served.prefix]
    found = []
    with tempfile.TemporaryDirectory() as scratch, computing_on(device):
        total = sum(len(state.shards[number].served.prefix) for number in numbers)
        lessons = _lessons(folder, state, Path(scratch) / "work", device, progress, total)
        for number in numbers:
            shard = state.shards[number]
            with reproducible(shard.machine["threads"]):
                trained = _trained_again(lessons, number, shard, Path(scratch))
            stored = _stored(folder, number, shard)
            agree = shard.served.sha256 == stored == trained
            before = shard.machine
            here = _here(device, shard)
            found.append(
                {
                    "shard": number,
                    "prefix": shard.served.prefix,
                    "recorded": shard.served.sha256,
                    "stored": stored,
                    "trained": trained,
                    "holds": agree,
                    "elsewhere": {k: [before.get(k), v] for k, v in here.items() if before.get(k) != v},
                }
            )
    return {
        "folder": str(folder),
        "holds": all(shard["holds"] for shard in found),
        "shards": found,
        "receipt": receipt(state),
    }


def _here(device: str, shard: Shard) -> dict[str, Any]:
    """This machine, with the number of threads that a shard was trained on."""
    return machine(device) | {"threads": shard.machine["threads"]}


def _enter(work: Path, here: dict[str, Any]) -> None:
    """Create the folder of a retraining, or return to the one of a killed run.

    Args:
        work: the folder.
        here: the kind of this machine.

    Raises:
        BadInput: the killed run was on another kind of machine, whose stages differ in their last bits.
    """
    kept = work / "machine.json"
    if not kept.exists():
        shutil.rmtree(work, ignore_errors=True)  # nobody knows where these stages were trained
        work.mkdir()
        write_atomically(kept, json.dumps(here))
    elif (before := json.loads(kept.read_text())) != here:
        differing = [
            f"{key} {before.get(key)}, not {here[key]}" for key in here if here[key] != before.get(key)
        ]
        raise BadInput(
            f"'{work}' holds an interrupted retraining on another machine ({' and '.join(differing)}); go on "
            "there, or remove that folder to start over."
        )


def _trained_again(lessons: Lessons, number: int, shard: Shard, scratch: Path) -> str | None:
    """The receipt of a new training of what a shard serves; None where nothing is left to train on."""
    if not any(shard.slices[slice_] for slice_ in shard.served.prefix[:1] if slice_ not in shard.dead):
        return None
    stages = lessons.train(number, shard, scratch, [shard.served.prefix])
    return prefix_sha256(list(stages.values()))


def _stored(folder: Path, number: int, shard: Shard) -> str | None:
    """The receipt of the files that a shard serves; None where one is missing."""
    files = served_files(folder, number, shard)
    return prefix_sha256([file_sha256(file) for file in files]) if all(map(Path.exists, files)) else None


def _lessons(
    folder: Path, state: Sharded, work: Path, device: str, progress: Progress, total: int
) -> Lessons:
    """What trains shards of a folder again, from the base model in it.

    Raises:
        BadInput: the base model is not the one that was trained on.
    """
    base = base_of(open_checkpoint(folder))
    if base.sha256 != state.base:
        raise BadInput(f"The base model in '{folder}' is not the one that S3T trained on.")
    examples = {n: e for n, e in read_examples(folder, state).items() if n not in state.deleted}
    return Lessons(state, examples, base, work, device, progress, total)


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise BadInput("The method s3t needs peft: pip install 'compress-model[peft]'.")


@contextmanager
def _changing(folder: Path) -> Iterator[Sharded]:
    """Keep other commands away from a folder, and finish what a killed one left.

    Raises:
        BadInput: the folder was not written by S3T, or another command is changing it.
    """
    read_sharded(folder)
    with Workspace(folder.absolute()).locked():
        state = read_sharded(folder)
        _tidy(folder, state)
        yield state


def _tidy(folder: Path, state: Sharded) -> None:
    """Remove the files in ``s3t/`` that the state does not name."""
    named = {STATE, state.examples, *([RETRAINING] if _exhausted(state) else [])}
    for number, shard in enumerate(state.shards):
        place = stage_folder(number, shard.generation)
        if shard.stages:
            named.add(place)
        for file in (folder / KEY / place).glob("*"):
            if file.stem not in shard.stages:
                file.unlink()
    for path in (folder / KEY).iterdir():
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _exhausted(state: Sharded) -> list[int]:
    return [number for number, shard in enumerate(state.shards) if not shard.served.prefix]


def _found(forget: str, examples: Mapping[str, Example], state: Sharded) -> list[str]:
    """The ids of the training records with the same words as those of a set.

    Raises:
        BadInput: a record of the set is not in the training data.
    """
    by_hash: dict[str, list[str]] = {}
    for name, example in examples.items():
        by_hash.setdefault(example.hash, []).append(name)
    found = []
    for record in read_records(forget).entries:
        if record.hash not in by_hash:
            raise BadInput(
                f"The record '{record.id}' of '{forget}' ('{record.words[:40]}') is not in the training data"
                + (", or was deleted before." if state.deleted else ".")
            )
        found += by_hash[record.hash]
    return list(dict.fromkeys(found))


def _check_ids(wanted: Sequence[str], examples: Mapping[str, Example], state: Sharded) -> None:
    if not wanted:
        raise BadInput("Name the records to delete by their ids, or by --forget and a set of records.")
    for position, name in enumerate(wanted):
        if name in state.deleted:
            raise BadInput(f"The record '{name}' was deleted before.")
        if name not in examples:
            near = nearest(name, examples)
            raise BadInput(f"There is no record '{name}'" + (f"; did you mean {near}?" if near else "."))
        if name in wanted[:position]:
            raise BadInput(f"The record '{name}' is named twice.")


def _warn_of_copies(gone: set[str], examples: Mapping[str, Example]) -> None:
    """Say which records have the same words as a deleted one, and stay."""
    hashes = {examples[name].hash: name for name in gone}
    for name, example in examples.items():
        if name not in gone and example.hash in hashes:
            log.warning("The record '%s' has the same words as '%s', and stays.", name, hashes[example.hash])
