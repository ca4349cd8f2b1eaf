"""compress-model recipes"""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from compress.commands.common import check_file, common_options, print_json


@click.command()
@click.argument("name", required=False)
@click.option(
    "--copy", type=click.Path(path_type=Path), help="Write the recipe to this new file, to edit it."
)
@common_options
def recipes(name: str | None, copy: Path | None, as_json: bool) -> None:
    """List the bundled recipes, or show or copy one."""
    from compress.errors import BadInput, unknown
    from compress.pipeline.recipe import bundled_recipes
    from compress.system.files import write_atomically

    bundled = bundled_recipes()
    if name is None:
        if copy is not None:
            raise click.UsageError("Say which recipe to copy.")
        if as_json:
            print_json({key: file.read_text(encoding="utf-8") for key, file in bundled.items()})
            return
        for key, file in bundled.items():
            first_line = file.read_text(encoding="utf-8").partition("\n")[0]
            click.echo(f"{key.ljust(max(map(len, bundled)))}  {first_line.lstrip('# ')}")
        return
    if name not in bundled:
        raise unknown("recipe", name, bundled)
    text = bundled[name].read_text(encoding="utf-8")
    if copy is not None:
        check_file(copy)
        if copy.exists():
            raise BadInput(f"'{copy}' exists already; copy to another file.")
        write_atomically(copy, text)
    if as_json:
        print_json({name: text})
    elif copy is None:
        click.echo(text, nl=False)
