"""What all commands share: options, logging, progress and the way results are printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click
from rich.console import Console

DTYPES = ["float32", "bfloat16", "float16"]


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json, -v, -q and --debug, which every command has; ``as_json`` is passed on."""
    decorators = [
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
        *logging_options,
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _set_up_logging(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    levels = ctx.meta.setdefault("compress.levels", {"verbose": False, "quiet": False})
    levels[parameter.name] = value
    level = logging.DEBUG if levels["verbose"] else logging.WARNING if levels["quiet"] else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("compress").setLevel(level)
    return value


logging_options = [
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_up_logging,
        help="Say more.",
    ),
    click.option(
        "-q",
        "--quiet",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_up_logging,
        help="Say less.",
    ),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
]
seed_option = click.option("--seed", type=int, default=None, help="Seed of every random choice. [default: 0]")
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Store what is not quantized in this dtype. [default: as it is]",
)


@contextmanager
def progress_shown() -> Iterator[Callable[[str, float], None]]:
    """A function (text, share done) that draws a bar on a terminal and prints plain lines elsewhere."""
    quiet = not logging.getLogger("compress").isEnabledFor(logging.INFO)
    if quiet:
        yield lambda text, share: None
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            tasks: dict[str, Any] = {}

            def show(text: str, share: float) -> None:
                if text not in tasks:
                    tasks[text] = bar.add_task(text, total=1.0)
                bar.update(tasks[text], completed=share)

            yield show
    else:
        last: dict[str, int] = {}

        def line(text: str, share: float) -> None:
            quarter = int(share * 4)
            if last.get(text) != quarter:
                last[text] = quarter
                print(f"{text}: {share:.0%}", file=sys.stderr, flush=True)

        yield line


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, default=str))


def stdout() -> Console:
    """The console results are printed on."""
    return Console(highlight=False)
