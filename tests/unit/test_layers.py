"""The rooms stand on floors: a room imports from the floors below it, never from beside or above.

Read with ``ast`` from the tree itself: tools that walk the folder of an installed package see only
``compress/``, because pyproject.toml maps the other rooms into it from folders beside it.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# From the roof to the ground. Rooms on one floor do not import each other. The face of the package,
# compress/__init__.py, is not a room.
FLOORS = (
    ("compress.__main__",),
    ("compress.cli",),
    ("compress.commands",),
    ("compress.search", "compress.export"),
    ("compress.evaluation",),
    ("compress.pipeline",),
    ("compress.pruning", "compress.quantization", "compress.unlearning"),
    ("compress.method",),
    ("compress.calibration",),
    ("compress.engine",),
    ("compress.report", "compress.sources"),
    ("compress.anatomy", "compress.storage"),
    ("compress.kernels",),
    ("compress.system",),
    ("compress.errors",),
)
HEIGHT = {room: -number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str | None:
    """The room a module is in; None for the face of the package."""
    return next((room for room in HEIGHT if f"{module}.".startswith(f"{room}.")), None)


def modules() -> Iterator[tuple[str, Path]]:
    """Name and file of every module, through the folders that pyproject.toml maps."""
    for package, folder in SETUP["package-dir"].items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *file.relative_to(ROOT / folder).with_suffix("").parts])
            yield name.removesuffix(".__init__"), file


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of ours that a file imports, also in functions and for types only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "compress":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from ((node.lineno, name) for name in names if name.startswith("compress."))


def test_every_module_is_in_a_room() -> None:
    assert [name for name, _ in modules() if room_of(name) is None] == ["compress"]


def test_imports_go_down() -> None:
    wrong = []
    for name, file in modules():
        for line, wanted in imports(file):
            here, there = room_of(name), room_of(wanted)
            if here and there and here != there and HEIGHT[here] <= HEIGHT[there]:
                where = f"{file.relative_to(ROOT)}:{line}"
                wrong.append(f"{where}: {here} imports {wanted}, which does not stand below it")
    assert not wrong, "\n".join(wrong)


def test_the_wheel_holds_every_folder() -> None:
    folders = {name for name, file in modules() if file.name == "__init__.py"}
    assert set(SETUP["packages"]) == folders
