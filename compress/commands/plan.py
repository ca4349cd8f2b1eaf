"""compress-model plan"""

from __future__ import annotations

import logging
from typing import Any

import rich_click as click

from compress.commands.common import (
    common_options,
    dtype_option,
    make_table,
    print_json,
    revision_option,
    settings_option,
    stdout,
)

log = logging.getLogger(__name__)


@click.command()
@click.argument("model")
@click.argument("recipe")
@settings_option
@revision_option
@dtype_option
@common_options
def plan(
    model: str,
    recipe: str,
    settings: tuple[str, ...],
    revision: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Predict what RECIPE makes of MODEL: bytes, parameters, and what can load it. Reads headers only."""
    from compress.pipeline.plan import make_plan, open_model
    from compress.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, {"model": model, "revision": revision, "dtype": dtype}, list(settings))
    tell_plan(make_plan(open_model(loaded)[1], loaded.steps), as_json)


def tell_plan(plan: Any, as_json: bool) -> None:
    """Print a `compress.pipeline.plan.Plan`."""
    if plan.warning:
        log.warning("%s", plan.warning)
    if as_json:
        print_json(plan.document())
        return
    table = make_table(
        *("step", "layers", "parameters (M)", "weights (MB)", "bits/parameter", "loads with"),
        caption="Predicted from config.json and safetensors headers; MB = 10^6 bytes of tensors.",
    )
    for column in table.columns[1:5]:
        column.justify = "right"

    def row(name: str, layers: int, parameters: int, nbytes: int, loads_with: str) -> None:
        bits = 8 * nbytes / parameters
        table.add_row(
            name, str(layers), f"{parameters / 1e6:,.1f}", f"{nbytes / 1e6:,.1f}", f"{bits:.2f}", loads_with
        )

    before = plan.before
    row("as it is", before.num_layers, before.parameters, before.nbytes, str(before.loads_with))
    for step in plan.steps:
        row(step.method, step.layers, step.parameters, step.nbytes, step.loads_with)
    stdout().print(table)
