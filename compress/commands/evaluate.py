"""compress-model evaluate"""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from click.core import ParameterSource

import compress
from compress.commands.common import (
    check_file,
    device_option,
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
    help="Labelled examples (.jsonl) to score an encoder with a task head on, in place of text.",
)
@click.option(
    "--text", default="bundled:evaluation", show_default=True, help="Text to score; as for calibration."
)
@click.option(
    "--context",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens in a window; also the stride.",
)
@click.option(
    "--windows", type=click.IntRange(1), default=32, show_default=True, help="Number of windows at most."
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Of a model stored in blocks (bitstack, nested), measure the largest size that fits, such as 90MB.",
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the result as JSON to FILE, or to stdout.",
)
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
    context: int,
    windows: int,
    memory: str | None,
    json_file: str | None,
    device: str,
) -> None:
    """Measure MODEL: perplexity, divergence from the dense model, bytes, memory, speed.

    With --task-file: accuracy or F1, agreement with the dense model, FLOPs and latency instead of what text
    tells.

    If compress-model wrote MODEL, the result is also kept in its compression.json.
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
    given = click.get_current_context().get_parameter_source
    if task_file is not None:
        for name in ("text", "context", "windows"):
            if given(name) is ParameterSource.COMMANDLINE:
                raise BadInput(f"With --task-file no text is scored; leave out --{name}.")
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
