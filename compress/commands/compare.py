"""compress-model compare"""

from __future__ import annotations

from pathlib import Path

import rich_click as click

import compress
from compress.commands.common import check_file, common_options, revision_option, stdout


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="MODEL|FILE...")
@click.option(
    "--format",
    type=click.Choice(["table", "markdown", "latex", "csv", "json", "html"]),
    help="Output format; html is one self-contained page with plots. [default: table]",
)
@revision_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write to this file instead of stdout.",
)
@common_options
def compare(
    paths: tuple[str, ...],
    format: str | None,
    revision: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Put evaluated models into one table, the dense model first.

    Each argument is a model (a folder, a .gguf file, or a hub id, of which only the record is downloaded)
    with evaluations in its record, or a JSON file that 'compress-model evaluate --json' wrote. The command
    refuses evaluations that were made in different ways: on another text, or against another dense model. A
    task that was asked differently is marked.
    """
    from compress.errors import BadInput
    from compress.report.render import print_table, render
    from compress.sources.find import find_record

    if as_json and format not in (None, "json"):
        raise click.UsageError(f"--json and --format {format} contradict each other.")
    format = "json" if as_json else format or "table"
    if output:
        check_file(output)
    records = [find_record(path, revision) for path in paths]
    if revision is not None and not any(records):
        raise BadInput(f"None of these is a hub model, so none has a revision '{revision}'.")
    comparison = compress.compare(*(record or path for record, path in zip(records, paths, strict=True)))
    if output:
        from compress.system.files import write_atomically

        write_atomically(output, render(comparison, format))
    elif format == "table":
        print_table(comparison, stdout())
    else:
        click.echo(render(comparison, format), nl=False)
