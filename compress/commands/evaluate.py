"""compress-model evaluate"""

from __future__ import annotations

import sys
from pathlib import Path

import rich_click as click
from click import get_current_context
from click.core import ParameterSource

import compress
from compress.commands.common import (
    check_file,
    device_option,
    kernel_option,
    logging_options,
    print_json,
    progress_shown,
    revision_option,
    stdout,
)


@click.command()
@click.argument("model", required=False, metavar="MODEL")
@click.option("--baseline", help="The dense model to compare with. [default: MODEL itself]")
@revision_option
@click.option("--baseline-revision", help="Branch, tag or commit of a baseline on the hub.")
@click.option(
    "--suite", type=click.Choice(["quick"]), default="quick", show_default=True, help="What to measure."
)
@click.option(
    "--task-file",
    metavar="FILE",
    help="Labelled examples (.jsonl) for an encoder with a task head; they are scored instead of text.",
)
@click.option(
    "--text",
    default="bundled:evaluation",
    show_default=True,
    help="Text to score, named like calibration text.",
)
@click.option(
    "--context",
    type=click.IntRange(2, sys.maxsize),
    help="Tokens in a window; windows do not overlap. [default: 512, or as many as the model has positions "
    "for]",
)
@click.option(
    "--windows",
    type=click.IntRange(1, sys.maxsize),
    default=32,
    show_default=True,
    help="Largest number of windows.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Measure the largest version that fits into this much memory, for example 90MB (bitstack and nested "
    "only).",
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the result as JSON to FILE, or to stdout.",
)
@kernel_option
@device_option
@logging_options
def evaluate(
    model: str | None,
    baseline: str | None,
    revision: str | None,
    baseline_revision: str | None,
    suite: str,
    task_file: str | None,
    text: str,
    context: int | None,
    windows: int,
    memory: str | None,
    json_file: str | None,
    device: str,
    kernel: str,
) -> None:
    """Measure MODEL: perplexity, divergence from the dense model, bytes, memory, speed.

    With --task-file it measures accuracy or F1, agreement with the dense model, FLOPs and latency instead.

    If compress-model wrote MODEL, the result is also added to its compression.json.
    """
    from compress.errors import BadInput
    from compress.system.files import write_atomically

    if model is None:
        if json_file not in (None, "-"):
            raise BadInput(
                f"'{json_file}' was taken as the FILE of --json, so MODEL is missing; "
                f"write 'compress-model evaluate {json_file} --json'."
            )
        raise click.UsageError("Missing argument 'MODEL'.")
    if json_file not in (None, "-"):
        check_file(Path(json_file))
    ctx = get_current_context()
    if task_file is not None:
        for name in ("text", "context", "windows"):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise BadInput(
                    f"With --task-file no text is scored, so --{name} has no effect; leave it out."
                )
    with progress_shown() as progress:
        scorecards = compress.evaluate(
            model,
            revision=revision,
            baseline=baseline,
            baseline_revision=baseline_revision,
            task_file=task_file,
            text=text,
            context=context,
            windows=windows,
            memory=memory,
            device=device,
            kernel=kernel,
            progress=progress,
        )
    document = [card.model_dump(mode="json") for card in scorecards]
    if json_file == "-":
        print_json(document)
        return
    if json_file is not None:
        import json

        write_atomically(Path(json_file), json.dumps(document, indent=2))
    from compress.report.render import print_table

    print_table(compress.compare(scorecards), stdout())
