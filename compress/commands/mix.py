"""compress-model mix"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from compress.pipeline.mixing import Budget


@click.command()
@click.argument("recipe")
@click.option(
    "--memory",
    metavar="SIZE|FILE",
    help="Largest size of all tensors together, for example 90MB; or a file that the result must not exceed.",
)
@click.option("--bits", type=float, help="The same as bits per parameter, for example 3.5.")
@click.option(
    "--format",
    "target",
    type=click.Choice(["compress-model", "compressed-tensors", "mlx", "gguf"]),
    default="compress-model",
    show_default=True,
    help="What the result is to be. compress-model: every tensor is packed. compressed-tensors: transformers "
    "and vLLM load it, so the token embedding stays as it is. mlx, gguf: what 'export' in this "
    "format writes is as small as asked.",
)
@click.option(
    "--types",
    metavar="TYPE,TYPE",
    help="Types to choose from, for example 3,4,8 or Q4_K,Q6_K; by default 2,3,4,5,6,8, or all of gguf.",
)
@click.option("-m", "--model", help="Use this model instead of the recipe's.")
@revision_option
@settings_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="New recipe file to write; for gguf a JSON file of types.",
)
@seed_option
@device_option
@common_options
def mix(
    recipe: str,
    memory: str | None,
    bits: float | None,
    target: str,
    types: str | None,
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    output: Path,
    seed: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Choose the bits of each tensor by measured sensitivity, so that RECIPE's result is as small as asked.

    RECIPE has one quantization step. The command writes a new recipe that differs only in the bits, those of
    the token embedding and the head included; 'compress-model run' carries it out. For gguf it writes the
    type of each tensor of the file, which 'compress-model export' takes; then only RECIPE's model and
    calibration count.
    """
    import json
    import tempfile

    import yaml

    from compress.errors import BadInput
    from compress.pipeline.mixing import choose_for_gguf, choose_types
    from compress.pipeline.recipe import load_recipe
    from compress.system.files import write_atomically

    budget = _budget(memory, bits)
    check_file(output)
    if output.exists():
        raise BadInput(f"'{output}' exists already; write to another file.")
    loaded = load_recipe(recipe, {"model": model, "revision": revision, "seed": seed}, list(settings))
    wanted = None if types is None else [each.strip() for each in types.split(",")]
    # Beside the output, since what is measured may be larger than a /tmp that lies in memory.
    beside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent)
    document: dict[str, Any]
    with progress_shown() as progress, beside as folder:
        how: Any = {"device": device, "progress": progress}
        if target == "gguf":
            chosen = choose_for_gguf(loaded, wanted, budget, Path(folder), **how)
            found, document = chosen.mix, {"types_in_file": chosen.types}
            written = json.dumps(chosen.types, indent=1)
            what = "a GGUF file"
            then = f"Write it with 'export --format gguf --types {output}'."
        else:
            made = choose_types(loaded, target, wanted, budget, Path(folder), **how)
            found = made.mix
            document = {"loads_with": made.loads_with, "recipe": made.recipe.resolved()}
            written = yaml.safe_dump(document["recipe"], sort_keys=False)
            what = f"{loaded.steps[0][0].name} with all tensors"
            then = f"The result loads with {made.loads_with}."
    write_atomically(output, written)
    if as_json:
        print_json(
            {
                "bytes": found.nbytes,
                "predicted_loss": found.predicted,
                "measured_loss": found.measured,
                "tried": found.tried,
                "types": found.kinds,
                **document,
            }
        )
        return
    _tell(found.kinds)
    measured = (
        "not measured, because a single window of text leaves nothing to hold out"
        if found.measured is None
        else f"{found.measured:.3g} measured on held-out text with plainly rounded weights"
    )
    click.echo(
        f"{output}: {what} in {found.nbytes / 1e6:,.1f} MB; divergence from the dense model: "
        f"{found.predicted:.3g} nats a token predicted, {measured}. {then}"
    )


def _budget(memory: str | None, bits: float | None) -> Budget:
    """The size that --memory or --bits asks for.

    Raises:
        BadInput: not exactly one of them is given, or it is not a size.
    """
    from compress.errors import BadInput
    from compress.pipeline.mixing import Budget
    from compress.system.memory import parse_memory

    if (memory is None) == (bits is None):
        raise BadInput("Say how large the result may be, with either --memory or --bits.")
    if bits is not None:
        if not 0 < bits < float("inf"):
            raise BadInput(f"{bits:g} is not a number of bits per parameter; write it like 3.5.")
        return Budget(bits=bits)
    assert memory is not None
    if (file := Path(memory)).is_file():
        return Budget(nbytes=file.stat().st_size, file=True)
    if file.is_dir() or "/" in memory:
        raise BadInput(f"'{memory}' is not a file whose size could be asked for; name one, or write 90MB.")
    return Budget(nbytes=parse_memory(memory))


def _tell(kinds: dict[str, str]) -> None:
    """Print how many layers have each linear in each type, and the types of the tables."""
    import re

    order = list(dict.fromkeys(sorted(kinds.values(), key=lambda kind: (len(kind), kind))))
    counts: dict[str, Counter[str]] = {}
    for name, kind in kinds.items():
        counts.setdefault(re.split(r"\.\d+\.", name)[-1], Counter())[kind] += 1
    table = make_table("tensors", *(f"in type {kind}" for kind in order))
    for column in table.columns[1:]:
        column.justify = "right"
    for group, found in counts.items():
        table.add_row(group, *(str(found[kind]) for kind in order))
    stdout().print(table)
