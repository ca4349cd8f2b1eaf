"""compress-model export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from compress.commands.common import (
    common_options,
    device_option,
    print_json,
    progress_shown,
    revision_option,
)
from compress.commands.one_step import number_of, option_of
from compress.export.registry import TARGETS, find_target

TARGET_OPTIONS = "compress.target-options"
"""Key of the context's ``meta`` for the options of the format in use."""


class ExportCommand(click.RichCommand):
    """A command whose options depend on ``--format``: they are read off the target's declaration."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name = _format_name(args)
        if name is not None and not (ctx.resilient_parsing and name not in TARGETS):
            fields = find_target(name).Options.model_fields
            ctx.meta[TARGET_OPTIONS] = [option_of(key, field) for key, field in fields.items()]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        model, chosen, *others = super().get_params(ctx)
        return [model, chosen, *ctx.meta.get(TARGET_OPTIONS, []), *others]


def _format_name(args: list[str]) -> str | None:
    for position, arg in enumerate(args):
        if arg == "--format" and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith("--format="):
            return arg.partition("=")[2]
    return None


@click.command(cls=ExportCommand)
@click.argument("model")
@click.option(
    "--format",
    "target",
    required=True,
    metavar="|".join(TARGETS),
    help="The format; its own options follow with --help.",
)
@revision_option
@click.option("--no-verify", is_flag=True, help="Do not load the result with the program that it is for.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is there.")
@click.option("--dry-run", is_flag=True, help="Check and plan only; read headers, write nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder or file for the result.")
@device_option
@common_options
def export(
    model: str,
    target: str,
    revision: str | None,
    no_verify: bool,
    overwrite: bool,
    dry_run: bool,
    output: Path | None,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Write MODEL in the format of another program, and load the result with that program.

    'export MODEL --format NAME --help' shows the options of a format. Codes are carried over as they are; a
    model that a format cannot hold is refused.
    """
    from compress.export.run import export as carry_out
    from compress.export.run import open_for_export
    from compress.pipeline.recipe import validated
    from compress.system.device import check_device, computing_on

    check_device(device)
    chosen = find_target(target)
    values = {key: number_of(value) for key, value in given.items() if value not in (None, [], (), {})}
    options = validated(chosen.Options, values, f"the format {target}")
    opened = open_for_export(model, revision)
    if dry_run:
        promise = chosen.check(opened, options)
        if as_json:
            print_json({"bytes": promise.nbytes, "loads_with": promise.loads_with, "notes": promise.notes})
            return
        click.echo(f"{promise.nbytes / 1e6:,.1f} MB of {chosen.holds}, loads with {promise.loads_with}.")
        for note in promise.notes:
            click.echo(note)
        return
    if output is None:
        raise click.UsageError("Say where the result goes with -o.")
    with progress_shown() as progress, computing_on(device):
        lineage = carry_out(
            *(opened, chosen, options, output),
            overwrite=overwrite,
            verify=not no_verify,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(lineage.model_dump(mode="json"))
        return
    result, exported = lineage.result, lineage.exported
    click.echo(f"{output}: {result.bytes / 1e6:,.1f} MB of {chosen.holds}, loads with {result.loads_with}.")
    assert exported is not None
    for note in exported.notes:
        click.echo(note)
    click.echo(f"{exported.verification}.")
