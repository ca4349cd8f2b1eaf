"""The command ``compress-model``. Commands are listed here and imported only when they are run."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import rich_click as click

import compress
from compress.errors import CompressError, nearest, unknown

# name -> (module:function, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("compress.commands.run:run", "Carry out a recipe."),
    "prune": ("compress.commands.one_step:prune", "Prune a model with one method."),
    "quantize": ("compress.commands.one_step:quantize", "Quantize a model with one method."),
    "mix": ("compress.commands.mix:mix", "Choose the bits of each linear so that a model fits into memory."),
    "evaluate": ("compress.commands.evaluate:evaluate", "Measure a model and compare it with the dense one."),
    "compare": ("compress.commands.compare:compare", "Put evaluated models into one table."),
    "plan": ("compress.commands.plan:plan", "Predict what a recipe makes of a model, without doing it."),
    "inspect": ("compress.commands.inspect:inspect", "Show a model's lineage, shapes and bytes."),
    "methods": ("compress.commands.methods:methods", "List the methods, with papers and options."),
    "recipes": ("compress.commands.recipes:recipes", "List, show or copy the bundled recipes."),
    "doctor": ("compress.commands.doctor:doctor", "Show versions, devices, and what works here."),
}

RESUMED = "run, prune and quantize go on from the last finished layer when given again"

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
    """Make language models smaller - prune, quantize - and prove what it cost.

    MODEL is a folder, a hub id, or 'demo' (SmolLM2-135M from its PyPI package).
    """


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 wrong use or bad input, 130 interrupted.
    """
    debug = "--debug" in sys.argv
    # Threads that wait by spinning lose whole time slices when anything else runs on this machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A process that has imported torch and transformers looks for garbage for seconds before it ends.
    atexit.register(gc.freeze)
    if not {"-v", "--verbose"} & set(sys.argv):
        for name, setting in QUIET_LIBRARIES.items():
            os.environ.setdefault(name, setting)
    try:
        cli.main(prog_name="compress-model", standalone_mode=False)
        code = 0
    except CompressError as error:
        code = _say(str(error), error.exit_code, debug)
    except click.ClickException as error:
        code = _say(_in_one_sentence(error), error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        code = _say(f"Interrupted; {RESUMED}.", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            text = f"The disk is full; free some space and run the same command again: {RESUMED}."
        else:
            text = f"{error.strerror or error}: {error.filename}." if error.filename else f"{error}."
        code = _say(text, 1, debug)
    except MemoryError:
        code = _say("There is not enough memory; try fewer or shorter calibration windows.", 1, debug)
    except Exception as error:
        reason = " ".join(str(error).split())
        code = _say(f"Internal error ({type(error).__name__}: {reason}); --debug shows where.", 1, debug)
    logging.shutdown()
    sys.exit(code)


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


def _say(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"Error: {message}", err=True)
    return code
