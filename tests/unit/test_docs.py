"""The documents: short, true to the program and to the measurements, with links that lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rich_click as click
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_COMMANDS = [ROOT / "README.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
RESULTS = sorted((ROOT / "scripts" / "benchmarks" / "results").glob("*.json"))
BENCHMARKS = sorted((ROOT / "scripts" / "benchmarks").glob("*.py"))
LIBRARIES = (
    *("audits", "common", "elsewhere", "records", "llama_files", "tiny_models"),
    *("gpu_checks", "gpu_decode", "gpu_times"),
)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    return import_module("records")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of code of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


# --- shape ---


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 120] == []
    assert [line for line in lines if line.startswith("|") and line.count("|") > 6 + 1] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "measurements").glob("*.md")), ids=relative)
def test_pages_of_measurements_have_narrow_tables_and_no_speeds(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("|") and line.count("|") > 8 + 1] == []
    assert "tok/s" not in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- true to the program ---


def test_what_is_drawn_has_not_drifted() -> None:
    asked = [sys.executable, str(ROOT / "scripts" / "update_docs.py"), "--check"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def commands_shown(text: str) -> list[str]:
    """Every command line of compress-model in the indented blocks of a document."""
    found = re.findall(r"^    (?:\$ )?(compress-model .+)$", text, flags=re.M)
    return [line for line in found if "COMMAND" not in line]


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=relative)
def test_commands_shown_are_commands(document: Path) -> None:
    for line in commands_shown(document.read_text(encoding="utf-8")):
        parsed(line)


def parsed(line: str) -> dict[str, Any]:
    """The parameters of a command line; click raises an error where an option does not exist."""
    from compress.cli import COMMANDS

    name, *words = shlex.split(line, comments=True)[1:]
    assert name in COMMANDS, line
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    try:
        with command.make_context(f"compress-model {name}", words) as context:
            return context.params
    except click.ClickException as error:
        raise AssertionError(f"{line}: {error.format_message()}") from None


def test_a_command_that_is_wrong_is_seen() -> None:
    assert parsed("compress-model prune demo --method shortgpt --layers 5 -o x  # five")["layers"] == "5"
    with pytest.raises(AssertionError, match="no-such"):
        parsed("compress-model quantize demo --method rtn --no-such 4 -o x")


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=relative)
def test_recipes_shown_are_recipes(document: Path) -> None:
    from compress.pipeline.recipe import load_recipe

    for block in blocks(document.read_text(encoding="utf-8"), "yaml"):
        load_recipe(yaml.safe_load(block))


def test_options_named_in_the_readme_are_options() -> None:
    from compress.pipeline.registry import find_method, method_names

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"`([a-z-]+)((?: --[a-z-]+(?: [\w.]+)?)+)`", text)
    shown = [(name, options) for name, options in shown if name in method_names()]
    assert shown
    for name, options in shown:
        for option in re.findall(r"--([a-z-]+)", options):
            assert option.replace("-", "_") in find_method(name).Options.model_fields, (name, option)


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=relative)
def test_python_shown_compiles(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        compile(block, relative(document), "exec")


def test_the_names_used_from_python_are_there() -> None:
    import compress

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = blocks(text, "python")
    used = set(re.findall(r"compress\.(\w+)\(", block))
    assert used == set(compress.__all__) - {"__version__"}


def test_the_method_of_the_how_to_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers as hf

    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.engine.windows import Windows
    from compress.method import StepContext
    from compress.storage.checkpoint import Checkpoint
    from compress.storage.draft import Draft

    (source, *_) = blocks((ROOT / "docs/how-to/add-a-method.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "quiet_layers.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = import_module("quiet_layers").QuietLayers()

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=4))
    for parameter in model.model.layers[2].parameters():
        parameter.data *= 1e-3  # the layer that does least
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    tokens = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(1))
    windows = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random")
    context = StepContext(
        Draft(checkpoint, tmp_path / "work"), windows, 0, tmp_path / "work", "cpu", lambda *_: None
    )
    options = method.Options(layers=1)
    planned = method.plan(ModelShape.of(checkpoint), options)
    report = method.apply(StreamedModel(checkpoint), options, context)
    assert report.details["removed"] == [2]
    assert planned.num_layers == ModelShape.of(context.draft).num_layers == 3


# --- measurements ---


@pytest.mark.parametrize("file", RESULTS, ids=relative)
def test_results_are_valid(file: Path, records: ModuleType) -> None:
    if file.stem == "quickstart":
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        assert [row["dense"] for row in rows] == [True, *[False] * (len(rows) - 1)]
        return
    results = records.Results.read(file)
    names = [record.name for record in results.records]
    assert len(names) == len(set(names))
    keys = {"name", "seconds", "peak_memory"}
    for record in results.records:
        keys |= record.figures.keys() | record.facts.keys()
    if results.records:
        assert {column.key for table in results.tables for column in table.columns} <= keys


def test_results_are_written_as_they_are_read(tmp_path: Path, records: ModuleType) -> None:
    file = next(file for file in RESULTS if file.stem == "embeddings")
    results = records.Results.read(file)
    results.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == file.read_text()


def test_a_row_is_measured_once_and_replaces_its_record(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = import_module("common")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    measured = []

    def measure() -> dict[str, Any]:
        measured.append(1)
        return {"figures": {"cosine": {"value": 0.5}}, "seconds": 2.0}

    for _ in range(2):
        arguments = common.parser("", "embeddings").parse_args(["--folder", str(tmp_path / "work")])
        sheet = common.Sheet(arguments, "embeddings")
        row = sheet.row("rtn, 4 bits", measure)
        assert (row.figures["cosine"].value, row.seconds) == (0.5, 2.0)
        assert row.commit
        assert row.machine
    assert len(measured) == 1
    written = records.Results.read(tmp_path / "embeddings.json")
    assert [record for record in written.records if record.name == "rtn, 4 bits"] == [row]
    assert len(written.records) == 12  # the others stay


@pytest.mark.parametrize("script", BENCHMARKS, ids=relative)
def test_benchmarks_start(script: Path) -> None:
    if script.stem in LIBRARIES:
        compile(script.read_text(encoding="utf-8"), str(script), "exec")
        return
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--results NAME" in done.stdout
