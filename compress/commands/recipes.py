"""compress-model recipes"""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from compress.commands.common import common_options, print_json, stdout


@click.command()
@click.argument("name", required=False)
@click.option(
    "--copy", type=click.Path(path_type=Path), help="Write the recipe to this new file, to edit it."
)
@common_options
def recipes(name: str | None, copy: Path | None, as_json: bool) -> None:
    """List the bundled recipes, or show or copy one."""
    from compress.errors import BadInput, unknown
    from compress.files import write_atomically
    from compress.recipe import bundled_recipes

    bundled = bundled_recipes()
    if name is None:
        if copy is not None:
            raise click.UsageError("Say which recipe to copy.")
        if as_json:
            print_json({key: file.read_text(encoding="utf-8") for key, file in bundled.items()})
            return
        for key, file in bundled.items():
            stdout().print(
                f"[bold]{key}[/bold]  {file.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}"
            )
        return
    if name not in bundled:
        raise unknown("recipe", name, bundled)
    text = bundled[name].read_text(encoding="utf-8")
    if copy is not None:
        if copy.exists():
            raise BadInput(f"'{copy}' exists already.")
        if not copy.parent.is_dir():
            raise BadInput(f"There is no folder '{copy.parent}'.")
        write_atomically(copy, text)
    if as_json:
        print_json({name: text})
    elif copy is None:
        click.echo(text, nl=False)
