"""compress-model mix"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import rich_click as click

from compress.commands.common import (
    check_file,
    common_options,
    device_option,
    make_table,
    print_json,
    progress_shown,
    revision_option,
    seed_option,
    settings_option,
    stdout,
)


def _widths(ctx: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of widths; write 3,4,8.", ctx, option) from None


@click.command()
@click.argument("recipe")
@click.option("--memory", required=True, help="Largest size of all tensors together, for example 90MB.")
@click.option(
    "--bits",
    "widths",
    default="2,3,4,5,6,8",
    show_default=True,
    callback=_widths,
    help="Widths to choose from.",
)
@click.option("-m", "--model", help="Use this model instead of the recipe's.")
@revision_option
@settings_option
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="New recipe file to write."
)
@seed_option
@device_option
@common_options
def mix(
    recipe: str,
    memory: str,
    widths: list[int],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    output: Path,
    seed: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Choose the bits of each linear by its measured sensitivity, so that RECIPE's result fits into --memory.

    RECIPE has one quantization step. The command writes a new recipe that differs only in the bits;
    'compress-model run' carries it out.
    """
    import tempfile

    import yaml

    from compress.errors import BadInput
    from compress.pipeline.mixing import choose_bits
    from compress.pipeline.recipe import load_recipe
    from compress.system.files import write_atomically
    from compress.system.memory import parse_memory

    check_file(output)
    if output.exists():
        raise BadInput(f"'{output}' exists already; write to another file.")
    loaded = load_recipe(recipe, {"model": model, "revision": revision, "seed": seed}, list(settings))
    # Beside the output, since what is measured may be larger than a /tmp that lies in memory.
    beside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent)
    with progress_shown() as progress, beside as folder:
        found = choose_bits(
            loaded, widths, parse_memory(memory), Path(folder), device=device, progress=progress
        )
    method = loaded.steps[0][0]
    document = loaded.model_copy(update={"steps": [(method, found.options)]}).resolved()
    write_atomically(output, yaml.safe_dump(document, sort_keys=False))
    if as_json:
        print_json(
            {"bytes": found.nbytes, "expected_loss": found.loss, "bits": found.bits, "recipe": document}
        )
        return
    _tell(found)
    click.echo(
        f"{output}: {method.name} in {found.nbytes / 1e6:,.1f} MB of tensors; these bits are expected to "
        f"cost {found.loss:.3g} nats a token."
    )


def _tell(found: Any) -> None:
    """Print how many layers give each projection how many bits."""
    widths = sorted(set(found.bits.values()))
    counts: dict[str, Counter[int]] = {}
    for name, bits in found.bits.items():
        projection = name.rpartition(".")[2]
        counts.setdefault(projection, Counter())[bits] += 1
    table = make_table("projection", *(f"layers at {bits} bits" for bits in widths))
    for column in table.columns[1:]:
        column.justify = "right"
    for projection, found_widths in counts.items():
        table.add_row(projection, *(str(found_widths[bits]) for bits in widths))
    stdout().print(table)
