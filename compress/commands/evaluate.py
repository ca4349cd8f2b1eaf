"""compress-model evaluate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
from compress.evaluation.kick import SUITES


def _rows(ctx: click.Context, parameter: click.Parameter, value: str) -> int | str:
    """A number of rows, or ``auto``."""
    if value != "auto" and not (value.isdecimal() and int(value) > 0):
        raise click.BadParameter(f"'{value}' is neither a number above 0 nor auto")
    return value if value == "auto" else int(value)


@click.command()
@click.argument("model", required=False, metavar="MODEL")
@click.option("--baseline", help="The dense model to compare with. [default: MODEL itself]")
@revision_option
@click.option("--baseline-revision", help="Branch, tag or commit of a baseline on the hub.")
@click.option(
    "--suite",
    type=click.Choice(["text", *SUITES]),
    default="text",
    show_default=True,
    help="Text alone, or also questions: all of LLM-KICK (kick, kick-hub), or a few of them (quick).",
)
@click.option(
    "--tasks",
    metavar="NAME,...",
    help="Tasks and groups of lm-eval to ask, in place of a suite's, such as arc_easy,hellaswag.",
)
@click.option(
    "--include-path",
    multiple=True,
    metavar="DIR",
    help="Folder with files of tasks, beside those of lm-eval.",
)
@click.option(
    "--fewshot",
    type=click.IntRange(0, sys.maxsize),
    help="Examples in front of each question. [default: as many as the task says]",
)
@click.option(
    "--limit",
    type=click.IntRange(1, sys.maxsize),
    help="Largest number of questions of each task. [default: all, or as many as the suite says]",
)
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="N|auto",
    callback=_rows,
    help="Questions that are asked at once; answers do not depend on it.",
)
@click.option("--chat-template", is_flag=True, help="Put each question into the model's chat template.")
@click.option(
    "--judge",
    metavar="MODEL",
    help="Another model, which compares the answers to questions that have no right answer with the dense "
    "model's.",
)
@click.option("--judge-revision", help="Branch, tag or commit of a judge on the hub.")
@click.option("--samples", metavar="DIR", help="Write each question with its answer to DIR, as JSON lines.")
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
    "--margin",
    default="1pt",
    show_default=True,
    metavar="POINTS",
    help="The loss over all questions that does not matter, in percentage points.",
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="GATE",
    help="Exit with 1 unless this holds, such as kick:not-worse:1pt, kick_closed:matching, kl:below:0.05 or "
    "perplexity:ratio:1.05; may be given several times.",
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
    tasks: str | None,
    task_file: str | None,
    text: str,
    context: int | None,
    windows: int,
    memory: str | None,
    json_file: str | None,
    device: str,
    kernel: str,
    margin: str,
    gates: tuple[str, ...],
    **asking: Any,
) -> None:
    """Measure MODEL: perplexity, divergence from the dense model, bytes, memory, speed.

    With --suite or --tasks it also asks questions, and says whether MODEL answers worse than the dense model.

    With --task-file it measures accuracy or F1, agreement with the dense model, FLOPs and latency instead.

    If compress-model wrote MODEL, the result is also added to its compression.json.
    """
    from compress.errors import BadInput
    from compress.evaluation.gate import enforce, parse_margin, read_gates
    from compress.evaluation.harness.ask import check_installed
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
    named = [name for name in (tasks or "").split(",") if name]
    if tasks is not None and not named:
        raise BadInput(f"--tasks '{tasks}' names no task; name one, or leave it out.")
    suite = asking["suite"]
    known = [suite, *SUITES[suite].tasks] if suite in SUITES else named
    wanted = read_gates(gates, baseline, known, text=task_file is None)
    if not all(gate.of_text for gate in wanted):
        check_installed()  # without it the suite 'quick' scores text alone
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
            tasks=named,
            margin=parse_margin(margin),
            progress=progress,
            **asking,
        )
    document = [card.model_dump(mode="json") for card in scorecards]
    if json_file == "-":
        print_json(document)
        enforce(wanted, scorecards[-1])
        return
    if json_file is not None:
        import json

        write_atomically(Path(json_file), json.dumps(document, indent=2))
    from compress.report.render import print_table

    print_table(compress.compare(scorecards), stdout())
    for sentence in enforce(wanted, scorecards[-1]):
        click.echo(sentence)
