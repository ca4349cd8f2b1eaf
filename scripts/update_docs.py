#!/usr/bin/env python
"""Draw the documents that follow from the program and from measurements.

    python scripts/update_docs.py            write what has changed
    python scripts/update_docs.py --check    write nothing; exit with 1 and name the files that have drifted

- docs/measurements/*.md from scripts/benchmarks/results/*.json, one page for each file that has records;
- docs/measurements/quickstart.md from results/quickstart.json, a copy of out/quickstart/comparison.json;
- docs/methods.md, docs/commands.md and docs/model-folder.md from the program's own declarations;
- the parts of README.md that stand between markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``.

Third parties' methods are left out, so that the documents do not depend on what is installed beside us.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))

from method_summaries import GRADIENT_METHODS, IN_SHORT, MOST_WORDS  # noqa: E402
from records import FOLDER, Column, Record, Results, as_markdown, markdown_table  # noqa: E402

from compress.report.scorecard import Figure  # noqa: E402

QUICKSTART = "quickstart"  # not a Results document: what `compress-model compare --format json` wrote
DRAWN = "<!-- drawn by scripts/update_docs.py; edit what it is drawn from -->\n\n"

# --- measurements ---


def measurement_pages() -> dict[Path, str]:
    """Page -> content, with the list of all pages."""
    folder = ROOT / "docs" / "measurements"
    results = {name: found for name, found in all_results().items() if found.records}
    pages = {folder / f"{name}.md": measurement_page(found) for name, found in results.items()}
    pages[folder / "quickstart.md"] = quickstart_page()
    titles = {QUICKSTART: "The quickstart: one model, compressed in several ways"}
    titles |= {name: found.title for name, found in results.items()}
    listed = "".join(f"- [{title}]({name}.md)\n" for name, title in titles.items())
    pages[folder / "README.md"] = f"# Measurements\n\n{DRAWN}{MEASURED}\n{listed}"
    return pages


MEASURED = """\
Each page is drawn from a JSON file in [scripts/benchmarks/results](../../scripts/benchmarks/results), which
has every figure with its interval, the options of every step, and the commit that was measured. Rows that are
older than these files have the precision of the README that first showed them, and its commit.

Tokens per second and latencies are not shown, because the machines were shared with other work. Seconds to
compress were taken on the same machines: they tell fast methods from slow ones, and no more.

Intervals of top-1 agreement take the tokens of a window as independent in rows measured before 30 November
2026, and are narrower than those that compress-model gives now.
"""


def all_results() -> dict[str, Results]:
    """Every file of records by name."""
    files = sorted(file for file in FOLDER.glob("*.json") if file.stem != QUICKSTART)
    return {file.stem: Results.read(file) for file in files}


def measurement_page(results: Results) -> str:
    tables = [markdown_table(table, results.records) for table in results.tables]
    head = f"# {results.title}\n\n{DRAWN}{wrapped(results.summary)}\n"
    return head + "\n".join(tables) + "\n" + notes(results) + provenance(results)


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most 120 characters, ending with a newline."""
    lines = textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def as_list(lines: Iterable[str]) -> str:
    return "".join(wrapped(f"- {line}", indent="  ") for line in lines)


def notes(results: Results) -> str:
    """What the figures mean, as a list."""
    scored = [
        f"{text.windows} windows of {text.context:,} tokens of `{text.source}`"
        + (f" ({text.tokens:,} tokens scored)" if text.tokens else "")
        for text in results.texts
    ]
    return as_list([*results.notes, *([f"Scored on {'; '.join(scored)}."] if scored else [])])


def provenance(results: Results) -> str:
    """Command, date and machine."""
    records = results.records
    commits = ", ".join(dict.fromkeys(record.commit for record in records))
    dates = spanned(str(record.date) for record in records)
    machines = "; ".join(dict.fromkeys(record.machine for record in records))
    commands = "".join(f"    {command}\n" for command in results.commands)
    return f"\nMeasured by\n\n{commands}\n" + wrapped(f"{dates}, at {commits}. Machine: {machines}.")


def spanned(days: Iterable[str]) -> str:
    """``first`` or ``first to last``."""
    ordered = sorted(set(days))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


# --- the quickstart ---

QUICKSTART_PAGE = [
    [
        Column(key="model", heading="model"),
        Column(key="size", heading="size (MB)", decimals=1),
        Column(key="size_ratio", heading="size ÷ dense", decimals=3),
        Column(key="bits_per_parameter", heading="bits per parameter", decimals=2),
        Column(key="perplexity", heading="perplexity"),
        Column(key="perplexity_ratio", heading="perplexity ÷ dense", decimals=3),
        Column(key="kl_mean", heading="KL from dense (nats/token)", decimals=0),
        Column(key="top1_agreement", heading="top-1 agreement (%)", decimals=1),
    ],
    [
        Column(key="model", heading="model"),
        Column(key="parameters", heading="parameters (M)", decimals=1),
        Column(key="peak_memory", heading="peak memory (MB)", decimals=1),
        Column(key="added_memory", heading="memory added by the model (MB)", decimals=1),
        Column(key="kernel", heading="kernel"),
        Column(key="loads_with", heading="loads with"),
    ],
]
OFF_THE_GRID = (
    "The demo's published weights lie on a 4-bit grid. They were moved off it by an exact equivalence (the "
    "logits differ by less than 1e-3), because rounding them to 4 bits again would look lossless."
)
README_COLUMNS = ("model", "size", "perplexity", "kl_mean", "top1_agreement", "loads_with")


def quickstart() -> dict[str, Any]:
    """What ``compress-model compare --format json`` wrote of the quickstart's models."""
    return json.loads((FOLDER / f"{QUICKSTART}.json").read_text(encoding="utf-8"))


def quickstart_rows(columns: list[Column]) -> list[list[str]]:
    return [[comparison_cell(row["cells"], column) for column in columns] for row in quickstart()["rows"]]


def comparison_cell(cells: dict[str, Any], column: Column) -> str:
    cell = cells.get(column.key)
    if isinstance(cell, dict):
        return column.shown(Figure.model_validate(cell))
    return cell or "–"


def quickstart_table(columns: list[Column]) -> str:
    words = ("model", "kernel", "loads_with")
    numbers = [column.key not in words for column in columns]
    return as_markdown([column.heading for column in columns], quickstart_rows(columns), numbers)


def quickstart_page() -> str:
    tables = "\n".join(quickstart_table(columns) for columns in QUICKSTART_PAGE)
    captions = [line for line in quickstart()["caption"] if not line.startswith("Speed ")]
    summary = (
        "`scripts/quickstart` compresses SmolLM2-135M in several ways and compares every result with the "
        "dense model on text that it was not calibrated on. Bits per parameter count everything: scales, "
        "zero points, and the token embedding, which stays bfloat16 and is a fifth of this small model."
    )
    head = f"# The quickstart\n\n{DRAWN}{wrapped(summary)}\n"
    measured = f"\nMeasured by\n\n    scripts/quickstart\n\n{quickstart_provenance()}\n"
    return f"{head}{tables}\n{as_list([*captions, OFF_THE_GRID])}{measured}"


def quickstart_provenance() -> str:
    """Date and machine, from the scorecards of the rows."""
    document = quickstart()
    if "measured" in document:  # figures from before the JSON was kept
        return document["measured"]
    cards = [row["scorecard"] for row in document["rows"]]
    dates = spanned(card["when"][:10] for card in cards)
    measured = [card["cost"]["measured"] for card in cards if card["cost"].get("measured")]
    machines = dict.fromkeys(f"{found['device']}, {found['threads']} threads" for found in measured)
    return f"{dates}. Machine: {'; '.join(machines)}."


# --- methods ---


def our_methods() -> list[Any]:
    from compress.pipeline.registry import METHODS, find_method

    return [find_method(name) for names in METHODS.values() for name in names]


def methods_page() -> str:
    parts = [f"# Methods\n\n{DRAWN}`compress-model methods NAME` shows the same in the terminal.\n"]
    family = ""
    for method in our_methods():
        if method.family != family:
            family = method.family
            parts.append(f"## {family.capitalize()}\n")
        parts.append(method_section(method))
    return "\n".join(parts)


def method_section(method: Any) -> str:
    from compress.commands.methods import describe, first_line

    needs = "Needs calibration text." if method.needs_calibration else "Needs no calibration text."
    if method.needs_package:
        needs += f" Needs `pip install 'compress-model[{method.needs_package}]'`."
    fields = method.Options.model_fields
    rows = [
        [
            f"`{option['name']}`",
            values(fields[option["name"]].annotation),
            default(option),
            escaped(option["description"]),
        ]
        for option in describe(method)["options"]
    ]
    table = as_markdown(["option", "values", "default", "meaning"], rows)
    summary = escaped(first_line(method))
    return f"### {method.name}\n\n{summary}\n\nPaper: {linked(method.paper)}. {needs}\n\n{table}"


def default(option: dict[str, Any]) -> str:
    from compress.commands.methods import shown

    return "required" if option["required"] else f"`{shown(option['default'])}`"


def values(annotation: Any) -> str:
    """What an option can be: its choices, or its kind."""
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    return ", ".join(dict.fromkeys(kind_of(kind) for kind in kinds))


def kind_of(kind: Any) -> str:
    names = {
        bool: "true, false",
        int: "whole number",
        float: "number",
        str: "text",
        list: "list",
        dict: "mapping",
    }
    origin = get_origin(kind) or kind
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    return names.get(origin, "text")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without the constraints of ``Annotated``."""
    if hasattr(annotation, "__metadata__"):
        return alternatives(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in alternatives(member))
    return (annotation,)


def linked(paper: Any) -> str:
    url = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url
    return f"[{escaped(paper.title)}]({url})" if url else escaped(paper.title)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too."""
    return re.sub(r"([|*_<])", r"\\\1", " ".join(text.split()))


# --- commands ---


def commands() -> dict[str, Any]:
    """Name -> click command, as the program's own help lists them."""
    from compress.cli import COMMANDS

    found = {}
    for name, (path, _) in COMMANDS.items():
        module, _, attribute = path.partition(":")
        found[name] = getattr(import_module(module), attribute)
    return found


def commands_page() -> str:
    head = f"# Commands\n\n{DRAWN}`compress-model COMMAND --help` shows the same in the terminal.\n"
    return "\n".join([head, *(command_section(name, command) for name, command in commands().items())])


def command_section(name: str, command: Any) -> str:
    import click

    context = click.Context(command, info_name=f"compress-model {name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    records = [
        parameter.get_help_record(context)
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "debug", "verbose", "quiet")
    ]
    rows = [[f"`{pipes_escaped(flags)}`", escaped(text)] for flags, text in filter(None, records)]
    table = as_markdown(["option", "meaning"], rows) if rows else ""
    text = inspect.cleandoc(command.help or "")
    section = f"## {name}\n\n    {usage}\n\n{text}\n\n{table}"
    if not isinstance(command, click.Group):
        return section
    return "\n".join([section, *(command_section(f"{name} {sub}", c) for sub, c in command.commands.items())])


def pipes_escaped(text: str) -> str:
    return text.replace("|", "\\|")


# --- the model folder ---

MODEL_FOLDER = (
    "The result of a run is a whole model folder. Config, weights, card and lineage are made anew, and "
    "settings are carried over from the source. What is left out is said in a sentence before the work "
    "begins, in the card and in `compression.json`. Of a model on the hub, only what is carried over is "
    "downloaded. The first row that matches counts."
)
LINKS = (
    "Links to files are followed, because the hub's cache is made of them; links to folders are not. "
    "Entries of `auto_map` that name code in the folder are removed, because code is neither run nor "
    "passed on. Licence, language and tags of the source's card are kept in the new card. If an index "
    "lists the weights, it decides which file each tensor is read from."
)


def model_folder_page() -> str:
    from compress.storage.companions import KINDS

    rows = [
        [
            kind.what,
            " ".join(f"`{name}`" for name in kind.patterns),
            ": ".join(filter(None, (kind.fate, kind.why))),
        ]
        for kind in KINDS
    ]
    table = as_markdown(["in the source", "files and folders", "in the result"], rows)
    head = f"# What becomes of a model folder\n\n{DRAWN}{wrapped(MODEL_FOLDER)}"
    return f"{head}\n{table}\n{wrapped(LINKS)}"


# --- README ---


def readme() -> str:
    """README.md with what belongs between its markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, draw in README_PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda found, draw=draw: f"{found[1]}{draw()}{found[2]}", text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"README.md must have one pair of markers <!-- {name} --> and <!-- /{name} -->.")
    return text


def readme_quickstart() -> str:
    columns = {column.key: column for columns in QUICKSTART_PAGE for column in columns}
    return quickstart_table([columns[key] for key in README_COLUMNS])


def readme_methods() -> str:
    methods = our_methods()
    rows = [
        [f"`{method.name}`", in_short(method.name), short_link(method.paper)]
        for method in methods
        if method.name not in GRADIENT_METHODS
    ]
    here = ", ".join(f"`{method.name}`" for method in methods if method.name in GRADIENT_METHODS)
    rows.append([here, "gradient methods", "[all](docs/methods.md)"])
    return as_markdown(["method", "what it does", "paper"], rows)


def in_short(name: str) -> str:
    words = IN_SHORT.get(name)
    if words is None or len(words.split()) > MOST_WORDS:
        raise SystemExit(f"Say in IN_SHORT what '{name}' does, in at most {MOST_WORDS} words.")
    return words


def short_link(paper: Any) -> str:
    return (
        f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else f"[article]({paper.url})"
    )


def readme_measured() -> str:
    """Three headline numbers with their intervals."""
    results = all_results()

    def figures(page: str, name: str) -> dict[str, Figure]:
        return record(results[page], name).figures

    pairs = (("mix", "awq, mixed in 104 MB"), ("quantization", "llama.cpp Q4_K_M"))
    mixed, peer = (figures(*pair) for pair in pairs)
    awq, rtn = (figures("quantization", f"{method}, 4 bits") for method in ("awq", "rtn"))
    flap, gone = (figures("pruning", name) for name in ("flap, least squares, 20 %", "shortgpt, 20 %"))
    kl = "wikipedia_512.kl"
    return (
        f"- **Bits for every tensor**: AWQ in {mixed['size'].value / 1e6:.0f} MB diverges from the dense "
        f"model by {mixed[kl].text} nats/token;\n  llama.cpp's Q4_K_M in {peer['size'].value / 1e6:.0f} MB, "
        f"made without an importance matrix, by {peer[kl].text}.\n"
        f"- **4 bits everywhere**: AWQ {awq[kl].text} nats/token, plain rounding {rtn[kl].text}, "
        f"{awq['size'].value / 1e6:.1f} MB each.\n"
        f"- **A fifth of the layers' parameters pruned**: perplexity {flap['perplexity'].text} with FLAP, "
        f"{gone['perplexity'].text}\n  with whole layers removed (ShortGPT); the dense model has "
        f"{figures('pruning', 'dense')['perplexity'].text}.\n"
    )


def record(results: Results, name: str) -> Record:
    return next(found for found in results.records if found.name == name)


README_PARTS: dict[str, Callable[[], str]] = {
    QUICKSTART: readme_quickstart,
    "methods": readme_methods,
    "measured": readme_measured,
}


# --- all of it ---


def documents() -> dict[Path, str]:
    """File -> what it should hold."""
    return {
        ROOT / "README.md": readme(),
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "commands.md": commands_page(),
        ROOT / "docs" / "model-folder.md": model_folder_page(),
        **measurement_pages(),
    }


def drifted() -> dict[Path, str | None]:
    """The files that differ from what they should hold; None for a page that should not be there."""
    wanted = documents()
    known = {file: None for file in (ROOT / "docs" / "measurements").glob("*.md") if file not in wanted}
    return known | {
        file: text
        for file, text in wanted.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file has drifted"
    )
    arguments = parser.parse_args()
    changes = drifted()
    for file, text in changes.items():
        print(file.relative_to(ROOT))
        if arguments.check:
            continue
        if text is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    if arguments.check and changes:
        sys.exit("These files have drifted; run scripts/update_docs.py.")


if __name__ == "__main__":
    main()
