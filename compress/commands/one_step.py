"""compress-model unlearn, prune and quantize: recipes of one step, with the method's options on the command
line."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import rich_click as click

from compress.commands.common import (
    common_options,
    device_option,
    dtype_option,
    result_options,
    revision_option,
    seed_option,
)
from compress.commands.methods import shown
from compress.commands.run import carry_out
from compress.errors import BadInput
from compress.method import Family
from compress.pipeline.registry import find_method, method_names, methods_of

METHOD_OPTIONS = "compress.method-options"
"""Key of the context's ``meta`` for the options of the method in use."""


class MethodCommand(click.RichCommand):
    """A command whose options depend on ``--method``: they are read off the method's declaration."""

    family: Family

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name = _method_name(args)
        renamed: Mapping[str, str] = {}
        if name is not None and not (ctx.resilient_parsing and name not in method_names()):
            method = find_method(name, self.family)
            if (
                getattr(method, "command", None)
                and not {"-h", "--help"} & {*args}
                and not ctx.resilient_parsing
            ):
                raise BadInput(f"{name} is no single step; see '{method.command} --help' for its commands.")
            options = method.Options
            renamed = options.renamed
            fields = options.model_fields
            ctx.meta[METHOD_OPTIONS] = [option_of(key, field) for key, field in fields.items()]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            old = error.option_name.lstrip("-").replace("-", "_")
            if old in renamed:
                new, comma, remark = renamed[old].partition(",")
                flag = f"--{new.replace('_', '-')}"
                raise BadInput(
                    f"The option '{error.option_name}' is now called '{flag}'{comma}{remark}."
                ) from None
            raise

    def get_help(self, ctx: click.Context) -> str:
        # Only now, because methods of other packages must be imported to know their family.
        method = next(param for param in self.params if isinstance(param, click.Option))
        method.help = f"One of: {', '.join(methods_of(self.family))}. With --help: its options."
        return super().get_help(ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        model, method, *others = super().get_params(ctx)
        own = ctx.meta.get(METHOD_OPTIONS, [])
        taken = {option.name for option in own}  # a method's seqlen comes before that of calibration text
        return [model, method, *own, *(option for option in others if option.name not in taken)]


def _method_name(args: list[str]) -> str | None:
    for position, arg in enumerate(args):
        if arg == "--method" and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith("--method="):
            return arg.partition("=")[2]
    return None


def option_of(key: str, field: Any) -> click.Option:
    flag = f"--{key.replace('_', '-')}"
    text = field.description or ""
    if not field.is_required():
        text += f" [default: {shown(field.get_default(call_default_factory=True, validated_data={}))}]"
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    settings: dict[str, Any] = {"help": text}
    settings |= {"required": True} if field.is_required() else {"default": None}
    if kinds == [bool]:
        return click.Option([f"{flag}/--no-{flag[2:]}", key], **settings)
    if any(get_origin(kind) is list for kind in kinds):
        return click.Option([flag, key], multiple=True, **(settings | {"default": ()}))
    if any(get_origin(kind) is dict for kind in kinds):
        several = {"multiple": True, "metavar": "NAME=VALUE", "callback": _mapping, "default": ()}
        return click.Option([flag, key], **(settings | several))
    choices = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if len(kinds) == 1 and choices:
        return click.Option([flag, key], type=click.Choice([str(choice) for choice in choices]), **settings)
    metavar = "NUMBER" if any(kind in (int, float) for kind in kinds) else "TEXT"
    return click.Option([flag, key], type=str, metavar=metavar, **settings)


def _mapping(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs, split at the last "=": names may be patterns. The last of two of a name counts, and
    comes last."""
    found: dict[str, Any] = {}
    for pair in values:
        name, equals, value = pair.rpartition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{pair}' is not NAME=VALUE.", ctx, option)
        found.pop(name, None)
        found[name] = number_of(value)
    return found


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__)
    return (annotation,)


def _command(name: str, family: Family, help_text: str) -> click.Command:
    decorators: list[Callable[[Any], Any]] = [
        click.argument("model"),
        click.option(
            "--method",
            required=True,
            shell_complete=lambda ctx, parameter, start: [
                n for n in methods_of(family) if n.startswith(start)
            ],
            help="The method; its options follow with --help.",  # completed by MethodCommand
        ),
        revision_option,
        click.option(
            "--calibration",
            default="bundled",
            show_default=True,
            help="Calibration text: a name, a file, hub:DATASET or generate.",
        ),
        click.option(
            "--nsamples", type=int, help="Number of calibration windows. [default: the method's own]"
        ),
        click.option(
            "--seqlen",
            type=int,
            help="Tokens in a calibration window. [default: the method's own, or as many as the model has "
            "positions for]",
        ),
        click.option("--chat-template", is_flag=True, help="Render conversations with the chat template."),
        result_options,
        dtype_option,
        seed_option,
        device_option,
        common_options,
    ]

    def run_one(
        model: str,
        method: str,
        output: Path | None,
        revision: str | None,
        calibration: str,
        nsamples: int | None,
        seqlen: int | None,
        chat_template: bool,
        dry_run: bool,
        resume: bool | None,
        overwrite: bool,
        dtype: str | None,
        seed: int | None,
        device: str,
        as_json: bool,
        **given: Any,
    ) -> None:
        if "seqlen" in find_method(method, family).Options.model_fields:
            given["seqlen"], seqlen = seqlen, None
        step = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        step = {key: number_of(value) for key, value in step.items() if value not in (None, [], {})}
        text = {
            "source": calibration,
            "nsamples": nsamples,
            "seqlen": seqlen,
            "chat_template": chat_template,
        }
        recipe = {"model": model, "calibration": text, "steps": [{"method": method, **step}]}
        changes = {"revision": revision, "dtype": dtype, "seed": seed}
        carry_out(recipe, changes, (), output, dry_run, resume, overwrite, device, as_json)

    decorated: Any = run_one
    for decorate in reversed(decorators):
        decorated = decorate(decorated)
    command_class = type(f"{name.title()}Command", (MethodCommand,), {"family": family})
    return click.command(name, cls=command_class, help=help_text)(decorated)


def number_of(value: Any) -> Any:
    """Numbers on the command line are numbers, as they are in a recipe."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


unlearn = _command(
    "unlearn",
    "unlearning",
    "Make MODEL forget with one method. 'unlearn MODEL --method NAME --help' shows the method's options.",
)
prune = _command(
    "prune",
    "pruning",
    "Prune MODEL with one method. 'prune MODEL --method NAME --help' shows the method's options.",
)
quantize = _command(
    "quantize",
    "quantization",
    "Quantize MODEL with one method. 'quantize MODEL --method NAME --help' shows the method's options.",
)
