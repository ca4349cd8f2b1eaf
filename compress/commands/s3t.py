"""compress-model s3t: train an ensemble from which records can be deleted exactly, and delete them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from compress.commands.common import (
    common_options,
    device_option,
    make_table,
    print_json,
    progress_shown,
    revision_option,
    seed_option,
    stdout,
)
from compress.commands.one_step import number_of, option_of
from compress.errors import CompressError, unknown
from compress.unlearning.s3t import S3T


class _Group(click.RichGroup):
    """A group that suggests the nearest command for one that does not exist."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(
                str(unknown("command", f"s3t {args[0]}", (f"s3t {n}" for n in self.commands)))
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    epilog="Each of these takes --json, -v/--verbose, -q/--quiet and --debug. 'compress-model methods s3t' "
    "explains the method.",
)
def s3t() -> None:
    """Train an ensemble from which records can be deleted exactly, and delete them (S3T, arXiv:2406.16257).

    'train' splits your records into shards and slices, and trains a LoRA for each stage. 'delete' removes at
    once what has seen a record; 'verify' proves it by training again without the record. The result is a
    model folder for compress.load.
    """


@s3t.command()
@click.argument("model")
@click.argument("data")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the ensemble."
)
@revision_option
@click.option("--resume/--fresh", default=None, help="Continue an interrupted training, or start over.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@seed_option
@device_option
@common_options
def train(
    model: str,
    data: str,
    output: Path,
    revision: str | None,
    resume: bool | None,
    overwrite: bool,
    seed: int | None,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an ensemble on DATA, on top of MODEL.

    DATA is a .jsonl file of records, each with 'text', 'question' and 'answer', or 'messages', and with an
    'id' to delete it by; or a named set, such as people:retain. A training that was killed goes on from its
    last finished stage when the same command is given again.
    """
    from pydantic import ValidationError

    from compress.errors import BadInput
    from compress.pipeline.sharded import budget as budget_of
    from compress.pipeline.sharded_training import train as train_ensemble

    values = {key: number_of(value) for key, value in given.items() if value is not None}
    try:
        options = S3T.Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise BadInput(f"{flag} {first['input']}: {first['msg']}.") from None
    with progress_shown() as progress:
        train_ensemble(
            model,
            data,
            output,
            options,
            revision=revision,
            seed=seed or 0,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    _tell(budget_of(output), as_json)


train.params[3:3] = [option_of(key, field) for key, field in S3T.Options.model_fields.items()]


@s3t.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("ids", nargs=-1)
@click.option(
    "--forget", help="Delete the records of this set: a .jsonl file, or people:, tofu: and the like."
)
@common_options
def delete(folder: Path, ids: tuple[str, ...], forget: str | None, as_json: bool) -> None:
    """Delete the records IDS from the ensemble in FOLDER, at once and exactly.

    Everything that was trained on a deleted record, and the record itself, is removed from the folder. With
    --forget, records are found by their words.
    """
    from compress.pipeline.sharded import delete as delete_records

    found = delete_records(folder, ids, forget)
    if as_json:
        print_json(found)
        return
    count, dead = len(found["deleted"]), len(found["slices"])
    click.echo(f"{folder}: {count} record{'s' * (count != 1)} deleted, with {dead} slice{'s' * (dead != 1)}.")
    _tell_exhausted(folder, found["exhausted"], found["empty"])
    click.echo(f"receipt {found['receipt']}")


@s3t.command()
@click.argument("folder", type=click.Path(path_type=Path))
@device_option
@common_options
def retrain(folder: Path, device: str, as_json: bool) -> None:
    """Train the exhausted shards of FOLDER again, on what is left of their records.

    A shard is exhausted when each of its orders has lost its first slice; 'budget' says so. One without any
    records stays left out. A killed run goes on from its last finished stage when it is given again on the
    same kind of machine.
    """
    from compress.pipeline.sharded import retrain as retrain_shards

    with progress_shown() as progress:
        found = retrain_shards(folder, device, progress)
    if as_json:
        print_json(found)
        return
    click.echo(f"{folder}: trained shard {' and '.join(map(str, found['trained']))} again.")
    click.echo(f"receipt {found['receipt']}")


@s3t.command()
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
def budget(folder: Path, as_json: bool) -> None:
    """Show what can still be deleted from the ensemble in FOLDER before it must be trained again."""
    from compress.pipeline.sharded import budget as budget_of

    _tell(budget_of(folder), as_json)


@s3t.command()
@click.argument("folder", type=click.Path(path_type=Path))
@device_option
@common_options
def verify(folder: Path, device: str, as_json: bool) -> None:
    """Prove that what FOLDER serves never saw a deleted record: train it without them, and compare.

    The LoRA of each shard must come out the same bit for bit. Exit code 1 if one does not.
    """
    from compress.pipeline.sharded import verify as verify_ensemble

    with progress_shown() as progress:
        found = verify_ensemble(folder, device, progress)
    if as_json:
        print_json(found)
    else:
        table = make_table("shard", "trained on slices", "receipt", "trained again")
        for shard in found["shards"]:
            words = "the same bits" if shard["holds"] else "differs"
            table.add_row(
                str(shard["shard"]), " ".join(map(str, shard["prefix"])), shard["recorded"][:16], words
            )
        stdout().print(table)
    if not found["holds"]:
        wrong = " and ".join(str(shard["shard"]) for shard in found["shards"] if not shard["holds"])
        elsewhere: dict[str, list[str]] = {}  # shards of the same machine are named together
        for shard in found["shards"]:
            for key, (before, after) in shard["elsewhere"].items() if not shard["holds"] else ():
                difference = f"was trained with {key} {before}, and here it is {after}"
                elsewhere.setdefault(difference, []).append(str(shard["shard"]))
        other = "".join(f"; shard {' and '.join(shards)} {words}" for words, shards in elsewhere.items())
        raise CompressError(
            f"The receipt of shard {wrong} does not hold: training without the deleted records gives another "
            f"LoRA than the one that is served{other}."
        )
    if not as_json:
        click.echo(f"receipt {found['receipt']}: it holds.")


def _tell(found: dict[str, Any], as_json: bool) -> None:
    """Print a budget."""
    if as_json:
        print_json(found)
        return
    table = make_table("shard", "records", "slices left", "serves", "live in each order", "survives any")
    for shard in found["shards"]:
        table.add_row(
            str(shard["shard"]),
            str(shard["records"]),
            f"{shard['slices'] - len(shard['dead'])} of {shard['slices']}",
            " ".join(map(str, shard["served"]["prefix"])) or "nothing",
            " ".join(str(order["live"]) for order in shard["orders"]),
            f"{shard['sure']} deleted slice{'s' * (shard['sure'] != 1)}",
        )
    stdout().print(table)
    expected = found["expected_deletions"]
    click.echo(
        f"{found['folder']}: {found['records']} records, {found['deleted']} deleted. About "
        f"{expected['first_shard']:,.0f} more can be deleted at random before a shard must be trained again, "
        f"and {expected['all_shards']:,.0f} before all must."
    )
    exhausted = [shard for shard in found["shards"] if shard["exhausted"]]
    empty = [shard["shard"] for shard in exhausted if not shard["records"]]
    _tell_exhausted(found["folder"], [shard["shard"] for shard in exhausted], empty)
    click.echo(f"receipt {found['receipt']}")


def _tell_exhausted(folder: Path | str, exhausted: list[int], empty: list[int]) -> None:
    """Say which shards are left out: those that can be trained again, and those without any records."""
    if empty:
        names = " and ".join(map(str, empty))
        click.echo(f"Shard {names} has no records left and stays left out of the ensemble.")
    if again := [number for number in exhausted if number not in empty]:
        names = " and ".join(map(str, again))
        click.echo(
            f"Shard {names} is exhausted and left out of the ensemble; 'compress-model s3t retrain {folder}' "
            "trains it again."
        )
