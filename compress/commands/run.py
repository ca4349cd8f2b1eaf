"""compress-model run"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

import compress
from compress.commands.common import (
    common_options,
    device_option,
    dtype_option,
    print_json,
    progress_shown,
    result_options,
    revision_option,
    seed_option,
    settings_option,
)


@click.command()
@click.argument("recipe")
@click.option("-m", "--model", help="Use this model instead of the recipe's.")
@revision_option
@settings_option
@result_options
@dtype_option
@seed_option
@device_option
@common_options
def run(
    recipe: str,
    model: str | None,
    revision: str | None,
    output: Path | None,
    settings: tuple[str, ...],
    dry_run: bool,
    resume: bool | None,
    overwrite: bool,
    dtype: str | None,
    seed: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Carry out RECIPE, a YAML file or the name of a bundled recipe."""
    changes = {"model": model, "revision": revision, "dtype": dtype, "seed": seed}
    carry_out(recipe, changes, settings, output, dry_run, resume, overwrite, device, as_json)


def carry_out(
    recipe: str | dict[str, Any],
    changes: dict[str, Any],
    settings: tuple[str, ...],
    output: Path | None,
    dry_run: bool,
    resume: bool | None,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Run a recipe, or only plan it, and print what came out."""
    from compress.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, changes, settings)
    if dry_run:
        from compress.commands.plan import tell_plan
        from compress.pipeline.plan import make_plan, open_model

        tell_plan(make_plan(open_model(loaded)[1], loaded.steps), as_json)
        return
    if output is None:
        raise click.UsageError("Say where the result goes with -o FOLDER.")
    with progress_shown() as progress:
        lineage = compress.run(
            loaded, output, resume=resume, overwrite=overwrite, device=device, progress=progress
        )
    if as_json:
        print_json(lineage.model_dump(mode="json"))
        return
    for step in lineage.steps:
        click.echo(f"{step.method}: {step.summary}")
    result, parent = lineage.result, lineage.parent
    click.echo(
        f"{output}: {result.bytes / 1e6:,.1f} MB of weights (before: {parent.bytes / 1e6:,.1f} MB), "
        f"{result.bits_per_parameter:.2f} bits per parameter, loads with {result.loads_with}."
    )
    if lineage.reload is not None and lineage.reload.promised is not None:
        click.echo(f"{lineage.reload.promised}.")
    if lineage.audits:
        click.echo(lineage.audits[-1]["sentence"])
    if lineage.evaluations:
        click.echo(f"The result was evaluated; 'compress-model compare {output}' shows the table.")
