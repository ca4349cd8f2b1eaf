"""compress-model run"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from compress.commands.common import (
    common_options,
    device_option,
    dtype_option,
    print_json,
    progress_shown,
    revision_option,
    seed_option,
)


@click.command()
@click.argument("recipe")
@click.option("-m", "--model", help="Use this model instead of the recipe's.")
@revision_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the result.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the recipe: steps.0.layers=4."
)
@click.option("--dry-run", is_flag=True, help="Validate and plan; read headers only, write nothing.")
@click.option("--resume/--fresh", default=None, help="Go on with an interrupted run, or throw it away.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
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
    from compress.pipeline.recipe import load_recipe

    changes = {"model": model, "revision": revision, "dtype": dtype, "seed": seed}
    loaded = load_recipe(recipe, changes, list(settings))
    execute_and_tell(loaded, output, dry_run, resume, overwrite, device, as_json)


def execute_and_tell(
    recipe: Any,
    output: Path | None,
    dry_run: bool,
    resume: bool | None,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Run a validated recipe (or only plan it), evaluate if it asks for that, and print what came out."""
    if dry_run:
        from compress.commands.plan import tell_plan
        from compress.pipeline.plan import make_plan
        from compress.pipeline.run import open_model

        tell_plan(make_plan(open_model(recipe)[1], recipe.steps), as_json)
        return
    if output is None:
        raise click.UsageError("Say where the result goes with -o FOLDER.")
    from compress.pipeline.run import execute

    with progress_shown() as progress:
        lineage = execute(
            recipe, output, resume=resume, overwrite=overwrite, device=device, progress=progress
        )
        if recipe.evaluate is not None:
            from compress.evaluation.evaluate import evaluate_folder
            from compress.storage.lineage import read_lineage

            wanted = recipe.evaluate
            evaluate_folder(
                str(output.absolute()),  # a folder may be called "demo"
                baseline=recipe.model,
                task_file=wanted.task_file,
                baseline_revision=recipe.revision,
                text=wanted.text,
                context=wanted.context,
                limit=wanted.windows,
                device=device,
                progress=progress,
            )
            lineage = read_lineage(output)
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
    if lineage.evaluations:
        click.echo(f"Evaluated; 'compress-model compare {output}' shows the table.")
