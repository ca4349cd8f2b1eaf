"""compress-model bench"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import rich_click as click

from compress.commands.common import (
    DTYPES,
    common_options,
    device_option,
    kernel_option,
    make_table,
    print_json,
    progress_shown,
    revision_option,
    stdout,
)

if TYPE_CHECKING:
    from compress.evaluation.bench import Bench, Times

POSITIVE = click.IntRange(1, sys.maxsize)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL[@NAME=VALUE,...]...")
@kernel_option
@click.option(
    "--activation-bits",
    type=click.Choice(["16", "8"]),
    default="16",
    show_default=True,
    help="Round the inputs of packed linears to 8 bits, which makes them faster.",
)
@click.option(
    "--head-bits",
    type=click.IntRange(2, 8),
    help="Round a head that is stored dense to this many bits when it is loaded.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Load the largest version that fits into this much memory, for example 90MB (bitstack and nested "
    "only).",
)
@click.option("--threads", type=POSITIVE, help="Threads of each model. [default: as many as torch takes]")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Compute in this dtype. [default: the one that is stored]"
)
@click.option(
    "--prefill-tokens",
    type=POSITIVE,
    default=512,
    show_default=True,
    help="Tokens in the prompt of a prefill.",
)
@click.option(
    "--decode-tokens", type=POSITIVE, default=32, show_default=True, help="Tokens that a decode generates."
)
@click.option(
    "--repetitions",
    type=POSITIVE,
    default=9,
    show_default=True,
    help="Repetitions of both, after a warm-up; the interval of a ratio needs six.",
)
@revision_option
@device_option
@common_options
def bench(
    models: tuple[str, ...],
    prefill_tokens: int,
    decode_tokens: int,
    repetitions: int,
    revision: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time MODELs side by side: prefill and decode at batch size 1, and peak memory.

    Each model has a process of its own, and they take turns within every repetition, so that a busy machine
    hits all of them alike. The others are compared with the first.

    After an @, a MODEL may have settings of its own, named like the options: 'DIR@kernel=reference',
    'DIR@head-bits=8,threads=1', 'ORG/NAME@revision=v2'. So one model can be timed in several ways.
    """
    from compress.evaluation import bench as benching
    from compress.evaluation.timed import Settings
    from compress.system.device import check_device

    shared = Settings(**settings | {"activation_bits": int(settings["activation_bits"])})
    contestants = [benching.contestant(name, shared, revision) for name in models]
    for each in contestants:
        check_device(each.settings.device)
    with progress_shown() as progress:
        found = benching.bench(contestants, prefill_tokens, decode_tokens, repetitions, progress)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show(found)


def _show(found: Bench) -> None:
    """Print one row for each model, and how it was measured."""
    compared = len(found.models) > 1
    headings = ["model", "kernel", "prefill\ntok/s", "decode\ntok/s", "peak memory\nMB"]
    if compared:
        headings[3:3], headings[5:5] = ["times\nthe first"], ["times\nthe first"]
    table = make_table(*headings)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found.models:
        works = [cell for times in (row.prefill, row.decode) for cell in _cells(times, compared)]
        table.add_row(row.name, row.kernel, *works, row.peak_memory.text)
    console = stdout()
    console.print(table)
    for line in _caption(found):
        console.print(line, style="dim")


def _cells(times: Times | None, compared: bool) -> list[str]:
    speed, ratio = (times.speed, times.ratio) if times else (None, None)
    return [figure.text if figure else "–" for figure in ([speed, ratio] if compared else [speed])]


def _caption(found: Bench) -> list[str]:
    models, prefill = found.models, found.models[0].prefill
    decode = next((model.decode for model in models if model.decode), None)
    threads = ", ".join(map(str, dict.fromkeys(model.threads for model in models)))
    devices = ", ".join(dict.fromkeys(model.device for model in models))
    what = f"Prefill of {prefill.tokens} tokens"
    if decode:
        what += f"; greedy decode of {decode.tokens} tokens after {found.prompt_tokens}"
    spread = " and the quartiles" * (prefill.speed.low is not None)
    repetitions = f"{found.repetitions} repetition{'s' * (found.repetitions > 1)}"
    lines = [
        f"{what}; batch size 1; {threads} thread{'' if threads == '1' else 's'} on {devices}.",
        f"Speeds: the median{spread} of {repetitions}.",
    ]
    if len(models) > 1:
        interval = any(model.prefill.ratio and model.prefill.ratio.low is not None for model in models)
        lines.append(
            "Times the first: the median of the ratios within each repetition"
            f"{', with its 95 % interval' if interval else ''}."
        )
    on_gpu = [model.peak_device_bytes is not None for model in models]
    places = ["of a process that holds one model only, libraries included"] * (not all(on_gpu))
    places += ["on a GPU what is allocated there"] * any(on_gpu)
    lines.append(f"Peak memory: {'; '.join(places)}; MB = 10^6 bytes.")
    return lines
