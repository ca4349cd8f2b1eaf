"""compress-model methods"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import rich_click as click

from compress.commands.common import common_options, make_table, print_json, stdout

log = logging.getLogger(__name__)


@click.command()
@click.argument("name", required=False)
@common_options
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or show one with its paper and options."""
    from compress.pipeline.registry import find_method

    found = all_methods() if name is None else [find_method(name)]
    if as_json:
        print_json([describe(method) for method in found])
        return
    if name is None:
        table = make_table("method", "family", "what it does", "paper")
        for method in found:
            table.add_row(method.name, method.family, first_line(method), str(method.paper))
        stdout().print(table)
        return
    method = found[0]
    click.echo(f"{method.name} ({method.family}): {method.paper}\n\n{inspect.getdoc(method)}\n")
    if method.needs_calibration:
        click.echo(f"Calibration text, where the recipe does not say how much: {method.text_size}.\n")
    table = make_table("option", "default", "meaning")
    for option in describe(method)["options"]:
        table.add_row(
            option["name"],
            "required" if option["required"] else shown(option["default"]),
            option["description"],
        )
    stdout().print(table)


def all_methods() -> list[Any]:
    """Every method that can be imported; a third party's broken one is named in a warning."""
    from compress.errors import CompressError
    from compress.pipeline.registry import find_method, method_names

    found = []
    for name in method_names():
        try:
            found.append(find_method(name))
        except CompressError as error:
            log.warning("%s", error)
    return found


def first_line(method: Any) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]


def shown(value: Any) -> str:
    """A default as one writes it in a recipe."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def describe(method: Any) -> dict[str, Any]:
    """A method's declaration as JSON data."""
    return {
        "name": method.name,
        "family": method.family,
        "summary": first_line(method),
        "paper": {"title": method.paper.title, "arxiv": method.paper.arxiv, "url": method.paper.url},
        "needs_calibration": method.needs_calibration,
        "calibration": method.text_size._asdict() if method.needs_calibration else None,
        "options": [
            {
                "name": key,
                "required": field.is_required(),
                "default": None
                if field.is_required()
                else field.get_default(call_default_factory=True, validated_data={}),
                "description": field.description or "",
            }
            for key, field in method.Options.model_fields.items()
        ],
    }
