"""What the benchmarks share: running compress-model, work that is not done twice, and keeping the results.

A benchmark works in a folder below ``out/``. What is there already is not done again, so that an interrupted
benchmark goes on; delete the folder to measure afresh. Every finished row replaces its record in
``results/NAME.json`` at once, and ``scripts/update_docs.py`` draws the pages from these files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from records import FOLDER, Record, Results, markdown_table

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str | Path) -> None:
    """Run compress-model in a process of its own, with its output on stderr."""
    print("$ compress-model", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "compress", *map(str, arguments)], check=True, stdout=sys.stderr)


def write_recipe(
    file: Path,
    model: Path,
    steps: list[dict[str, Any]],
    calibration: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a recipe and return its file."""
    settings: dict[str, Any] = {"model": str(model), "steps": steps, **more}
    if calibration is not None:
        settings["calibration"] = calibration
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def compressed(
    output: Path,
    model: Path,
    steps: list[dict[str, Any]],
    calibration: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The lineage of the model that ``steps`` make in the folder ``output``; made if it is not there yet.

    Sections of the recipe besides are given by name.
    """
    if not (output / "compression.json").exists():
        recipe = write_recipe(output.with_name(f"{output.name}.yaml"), model, steps, calibration, **more)
        command("run", recipe, "-o", output, "--overwrite")
    return lineage(output)


def lineage(folder: Path) -> dict[str, Any]:
    """What is in a folder's compression.json."""
    return json.loads((folder / "compression.json").read_text())


def evaluated(model: Path, dense: Path, *options: str | Path) -> list[dict[str, Any]]:
    """The scorecards of the dense model and of ``model``; measured if they are not beside the folder yet."""
    file = model.with_name(f"{model.name}.scorecard.json")
    if not file.exists():
        command("evaluate", model, "--baseline", dense, *options, "--json", file)
    return json.loads(file.read_text())


def dense_model(folder: Path) -> Path:
    """The demo model in bfloat16, made once in ``folder``."""
    output = folder / "dense"
    if not (output / "compression.json").exists():
        command("run", "bfloat16", "-o", output, "--overwrite")
    return output


def stamp() -> dict[str, Any]:
    """Where and by what a row was measured: machine, commit, date and versions."""
    from compress.storage.lineage import versions

    return {
        "machine": machine(),
        "commit": commit(),
        "date": str(datetime.date.today()),
        "versions": versions(),
    }


def machine() -> str:
    """The processor and the number of cores that this process may use."""
    names = re.findall(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), flags=re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def _read(file: str) -> str:
    return Path(file).read_text() if Path(file).exists() else ""


def commit() -> str:
    """The commit of the code, marked where files other than results were changed since; "unknown" outside a
    repository."""

    def git(*asked: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(ROOT), *asked]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    found = git("describe", "--always", "--exclude=*").stdout.strip()
    code = (".", ":(exclude)scripts/benchmarks/results")
    same = git("diff", "--quiet", "HEAD", "--", *code).returncode == 0
    return found + "+changes" * (not same) if found else "unknown"


def slug(name: str) -> str:
    """A row's name as the name of a file."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--folder", type=Path, default=Path(f"out/bench-{name}"), help="where the work lies")
    found.add_argument("--results", default=name, metavar="NAME", help="the file results/NAME.json to update")
    return found


class Sheet:
    """The rows of one benchmark: measured once, kept in its folder, and put into ``results/NAME.json``.

    Args:
        arguments: of `parser`.
        like: the results file whose head is taken where there is no ``results/NAME.json`` yet.
    """

    def __init__(self, arguments: argparse.Namespace, like: str) -> None:
        self.folder = arguments.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = Results.named(arguments.results, like)
        self.file = FOLDER / f"{arguments.results}.json"
        self.rows: list[Record] = []

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> Record:
        """The record of that name: read if it was measured in this folder, else measured and stamped."""
        file = self.folder / f"{slug(name)}.record.json"
        if file.exists():
            record = Record.model_validate_json(file.read_text())
        else:
            record = Record.model_validate({**stamp(), **measure(), "name": name})
            file.write_text(record.model_dump_json(exclude_defaults=True))
        self.rows.append(record)
        self.results.put(record)
        self.results.write(self.file)
        return record

    def show(self) -> None:
        """Print the tables of the rows of this run, in Markdown."""
        print("\n".join(markdown_table(table, self.rows) for table in self.results.tables))
        print(f"Kept in {self.file}; scripts/update_docs.py draws the page.", file=sys.stderr)
