"""The command ``compress-model``. Commands are listed here and imported only when they are run."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import rich_click as click

import compress
from compress.errors import CompressError, nearest, unknown
from compress.system.interrupts import RESUMED, end, end_interrupted, received
from compress.system.secrets import hidden
from compress.system.streams import show_what_can_be_shown

# name -> (module:function, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("compress.commands.run:run", "Carry out a recipe."),
    "unlearn": ("compress.commands.one_step:unlearn", "Make a model forget with one method."),
    "s3t": ("compress.commands.s3t:s3t", "Train so that records can be deleted exactly, and delete them."),
    "prune": ("compress.commands.one_step:prune", "Prune a model with one method."),
    "quantize": ("compress.commands.one_step:quantize", "Quantize a model with one method."),
    "mix": ("compress.commands.mix:mix", "Choose the bits of each linear so that a model fits into memory."),
    "evaluate": ("compress.commands.evaluate:evaluate", "Measure a model and compare it with the dense one."),
    "audit": ("compress.commands.audit:audit", "Find out whether a model stays forgotten."),
    "bench": ("compress.commands.bench:bench", "Time models side by side: tokens per second and memory."),
    "compare": ("compress.commands.compare:compare", "Put evaluated models into one table."),
    "plan": ("compress.commands.plan:plan", "Predict what a recipe makes of a model, without doing it."),
    "export": ("compress.commands.export:export", "Write a model in the format of another program."),
    "inspect": ("compress.commands.inspect:inspect", "Show a model's lineage, shapes and bytes."),
    "push": ("compress.commands.push:push", "Push a model to the hub, with its card."),
    "methods": ("compress.commands.methods:methods", "List the methods, with papers and options."),
    "recipes": ("compress.commands.recipes:recipes", "List, show or copy the bundled recipes."),
    "doctor": ("compress.commands.doctor:doctor", "Show versions, devices, and what works here."),
}

# The libraries under us read these when they are imported, so they are set first; -v lets the libraries talk.
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class LazyCommand(click.RichCommand):
    """A name and a help line that become the real command when it is used."""

    def __init__(self, name: str, path: str, short_help: str) -> None:
        super().__init__(name=name, help=short_help, short_help=short_help)
        self.path = path

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(module), attribute).make_context(*args, **kwargs)


class Commands(click.RichGroup):
    """The group of all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        return LazyCommand(name, *COMMANDS[name]) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(str(unknown("command", args[0], COMMANDS)))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(compress.__version__, prog_name="compress-model")
def cli() -> None:
    """Make language models smaller - unlearn, prune, quantize - and prove what it cost.

    MODEL is a folder, a hub id, or 'demo' (SmolLM2-135M from its PyPI package).
    """


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 wrong use or bad input, 130 interrupted, 143 terminated. If
    whoever reads stdout has gone (``| head``), the work is done all the same, and the code is 0.
    """
    _prepare()
    code, sentence = 0, ""
    try:
        cli.main(prog_name="compress-model", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        if "--debug" in sys.argv and sys.stderr is not None:
            sys.stderr.write(hidden(traceback.format_exc()))
        if received() is not None or isinstance(error, KeyboardInterrupt | click.Abort):
            end_interrupted()
        code, sentence = _answer(error)
    end(code, sentence and f"Error: {hidden(sentence)}")


def _prepare() -> None:
    """Settle what the environment says and what the libraries under us read when they are imported."""
    # Threads that wait by spinning lose whole time slices when anything else runs on this machine, and those
    # that sleep at once take long to wake up. GNU's can spin for some microseconds first.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # A process that has imported torch and transformers looks for garbage for seconds before it ends.
    atexit.register(gc.freeze)
    if not {"-v", "--verbose"} & set(sys.argv):
        for name, setting in QUIET_LIBRARIES.items():
            os.environ.setdefault(name, setting)
    if os.environ.get("COLUMNS", "").strip() == "0":  # a terminal that does not know its width
        del os.environ["COLUMNS"]
    show_what_can_be_shown(sys.stdout)


def _answer(error: BaseException) -> tuple[int, str]:
    """The exit code that an exception means, and a sentence, which is empty if nothing is to be said."""
    if isinstance(error, SystemExit):
        # click and rich end the process with 1 where whoever reads stdout has gone.
        if not isinstance(error.__context__, BrokenPipeError):
            raise error
        return 0, ""
    if isinstance(error, BrokenPipeError):
        return 0, ""
    if isinstance(error, CompressError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        return error.exit_code, _in_one_sentence(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"The disk is full; free some space and run the same command again: {RESUMED}."
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}: {error.filename}." if error.filename else f"{error}."
    if isinstance(error, MemoryError):
        return 1, "There is not enough memory; try fewer or shorter calibration windows."
    reason = " ".join(str(error).split())
    return 1, f"Internal error ({type(error).__name__}: {reason}); --debug shows where."


def _in_one_sentence(error: click.ClickException) -> str:
    """Click's complaint without its usage lines, and with our way to suggest names."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return message if message.endswith("?") else f"{message}."
    if isinstance(error, click.NoSuchOption):
        options = [name for option in context.command.get_params(context) for name in option.opts]
        near = nearest(error.option_name, [name for name in options if name.startswith("--")])
        message = f"There is no option '{error.option_name}'" + (f"; did you mean {near}?" if near else "")
        if near:
            return message
    return f"{message}; see '{context.command_path} --help'."
