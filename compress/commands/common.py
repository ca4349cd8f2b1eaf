"""Shared parts of the commands: options, logging, progress and printing."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from compress.errors import BadInput
from compress.system.interrupts import raise_if_received
from compress.system.secrets import hide_in_logs

DTYPES = ["float32", "bfloat16", "float16"]
PIPE_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json, -v, -q and --debug, which every command has; ``as_json`` is passed on."""
    json_option = click.option(
        "--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."
    )
    return json_option(logging_options(command))


def logging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-v, -q and --debug, which the command itself does not see."""
    hidden: dict[str, Any] = {"is_flag": True, "expose_value": False}
    eager: dict[str, Any] = {"is_eager": True, "callback": _set_up_logging, **hidden}
    for decorator in (
        click.option("--debug", help="Show the traceback of an error.", **hidden),
        click.option("-q", "--quiet", help="Say less.", **eager),
        click.option("-v", "--verbose", help="Say more.", **eager),
    ):
        command = decorator(command)
    return command


def _set_up_logging(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    levels = ctx.meta.setdefault("compress.levels", {"verbose": False, "quiet": False})
    levels[parameter.name] = value
    level = logging.DEBUG if levels["verbose"] else logging.WARNING if levels["quiet"] else logging.INFO
    others = logging.WARNING if levels["verbose"] else logging.ERROR
    logging.basicConfig(level=others, format="%(message)s", stream=sys.stderr, force=True)
    hide_in_logs()
    logging.getLogger("compress").setLevel(level)
    if not levels["verbose"]:
        warnings.simplefilter("ignore")
    return value


revision_option = click.option("--revision", help="Branch, tag or commit of a hub model.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),  # numpy takes no others
    default=None,
    help="Seed of every random choice. [default: 0]",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1."
)
kernel_option = click.option(
    "--kernel",
    default="auto",
    show_default=True,
    metavar="auto|reference|cuda|triton|cpu[:PATH]",
    help="What multiplies packed weights: the best that works here, plain torch, the CUDA kernels, Triton, "
    "or the native code of one path ('compress-model doctor' lists them). A model without packed weights is "
    "timed in stock transformers, unless a kernel is named.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Store what is not quantized in this dtype. [default: as it is]",
)


settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, for example steps.0.bits=3.",
)


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-o, --dry-run, --resume, --fresh and --overwrite: what becomes of the result of a run."""
    for decorator in (
        click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty."),
        click.option("--resume/--fresh", default=None, help="Continue an interrupted run, or start over."),
        click.option("--dry-run", is_flag=True, help="Check and plan only; read headers, write nothing."),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the result."),
    ):
        command = decorator(command)
    return command


@contextmanager
def progress_shown() -> Iterator[Callable[[str, float], None]]:
    """A function (text, share done) that draws a bar on a terminal and prints plain lines elsewhere."""
    quiet = not logging.getLogger("compress").isEnabledFor(logging.INFO)
    if quiet:
        yield lambda text, share: raise_if_received()
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            tasks: dict[str, Any] = {}

            def show(text: str, share: float) -> None:
                raise_if_received()
                if text not in tasks:
                    tasks[text] = bar.add_task(text, total=1.0)
                bar.update(tasks[text], completed=share)

            yield show
    else:
        last: dict[str, int] = {}

        def line(text: str, share: float) -> None:
            raise_if_received()
            quarter = int(share * 4)
            if last.get(text) != quarter:
                last[text] = quarter
                with suppress(BrokenPipeError):  # the work goes on if nobody reads about it
                    print(f"{text}: {share:.0%}", file=sys.stderr, flush=True)

        yield line


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, default=str))


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that makes its content.

    Raises:
        BadInput: it is a folder, or there is no folder to put it in that can be written.
    """
    if path.is_dir():
        raise BadInput(f"'{path}' is a folder; name a file to write to.")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"There is no folder '{path.parent}' to write '{path.name}' to.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise BadInput(f"'{path}' cannot be written, because the folder '{path.absolute().parent}' cannot.")


def stdout() -> Console:
    """The console tables are printed on. Sentences are echoed, so that nothing breaks their lines."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def make_table(*headers: str, title: str | None = None, caption: str | None = None) -> Table:
    """A table that folds what is too long and never cuts it; without headers if none are given."""
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", show_header=bool(headers)
    )
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
