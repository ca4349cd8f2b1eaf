"""compress-model audit"""

from __future__ import annotations

import sys
from typing import Any

import rich_click as click

from compress.commands.common import (
    common_options,
    device_option,
    kernel_option,
    print_json,
    progress_shown,
    revision_option,
    seed_option,
    stdout,
)


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Whole numbers between commas."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"'{value}' is not a list of whole numbers such as 0,10,50,100")
    return sorted({int(part) for part in parts})


def _names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Names between commas; None if none are given."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


@click.command()
@click.argument("model", metavar="MODEL")
@revision_option
@click.option("--forget", metavar="SET", help="Records to forget. [default: those of the model's own step]")
@click.option("--retain", metavar="SET", help="Records to retain. [default: those of the model's own step]")
@click.option("--holdout", metavar="SET", help="Records of the same kind that no model has seen.")
@click.option("--world", metavar="SET", help="Other records that count for utility.")
@click.option(
    "--target", metavar="MODEL", help="The model before unlearning. [default: what MODEL was made from]"
)
@click.option(
    "--retrained",
    metavar="MODEL",
    help="A model that never saw the forget set. Without it, the floor is what wrong answers score.",
)
@click.option("--target-revision", help="Branch, tag or commit of a --target on the hub.")
@click.option("--retrained-revision", help="Branch, tag or commit of a --retrained on the hub.")
@click.option(
    "--survives",
    metavar="STEP,...",
    callback=_names,
    help="Later steps to try: int8, int4, gptq, awq, nf4, int3, int2, prune20, prune50; with a group size, "
    "as in int4:64; joined, as in prune20+int4; or a recipe, for its later steps. [default: all of these]",
)
@click.option(
    "--relearn",
    metavar="N,...",
    default="0,10,50,100",
    show_default=True,
    callback=_numbers,
    help="Numbers of updates on the retain set after which to ask again; 0 for none.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, sys.maxsize),
    default=100,
    show_default=True,
    help="Largest number of records of each set but the forget set.",
)
@click.option(
    "--seqlen",
    type=click.IntRange(8, sys.maxsize),
    default=256,
    show_default=True,
    help="Tokens of a record at most.",
)
@click.option(
    "--strict", is_flag=True, help="Exit with 1 unless the model stays forgotten and is not damaged."
)
@kernel_option
@seed_option
@device_option
@common_options
def audit(
    model: str, relearn: list[int], seed: int | None, strict: bool, as_json: bool, **settings: Any
) -> None:
    """Find out whether MODEL stays forgotten, whatever is done to it afterwards.

    MODEL, the model it was made from, and a model that never learned the forget set are asked in many ways,
    as they are and after every later step. Recovery is 0 where it knows as little as a model that never
    learned, and 1 where it knows as much as before. It must be at most 0.10, and at most 0.05 above that of
    MODEL in full precision, at the upper end of a paired 95 % interval.

    Models of other tools can be audited too: name their --target. Finished parts are kept, so an audit that
    was interrupted goes on. If compress-model wrote MODEL, the result is added to its compression.json.
    """
    import compress
    from compress.errors import CompressError
    from compress.report.forgetting import print_audit

    with progress_shown() as progress:
        result = compress.audit(model, relearning=relearn, seed=seed or 0, progress=progress, **settings)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_audit(result, stdout())
    if strict and result.kind != "forgotten":
        raise CompressError(result.sentence)
