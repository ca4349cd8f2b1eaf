"""compress-model methods"""

from __future__ import annotations

from typing import Any

import rich_click as click

from compress.commands.common import common_options, print_json, stdout


@click.command()
@click.argument("name", required=False)
@common_options
def methods(name: str | None, as_json: bool) -> None:
    """List the methods, or show one with its paper and options."""
    from compress.registry import find_method, method_names

    found = [find_method(method) for method in ([name] if name else method_names())]
    if as_json:
        print_json([describe(method) for method in found])
        return
    from rich.table import Table

    console = stdout()
    if name is None:
        table = Table("method", "family", "what it does", "paper")
        for method in found:
            table.add_row(method.name, method.family, first_line(method), str(method.paper))
        console.print(table)
        return
    method = found[0]
    console.print(f"{method.name} ({method.family}): {method.paper}\n\n{type(method).__doc__.strip()}\n")
    table = Table("option", "default", "meaning")
    for option in describe(method)["options"]:
        table.add_row(
            option["name"],
            "required" if option["required"] else str(option["default"]),
            option["description"],
        )
    console.print(table)


def first_line(method: Any) -> str:
    return type(method).__doc__.strip().partition("\n")[0]


def describe(method: Any) -> dict[str, Any]:
    """A method's declaration as JSON data."""
    return {
        "name": method.name,
        "family": method.family,
        "summary": first_line(method),
        "paper": {"title": method.paper.title, "arxiv": method.paper.arxiv, "url": method.paper.url},
        "needs_calibration": method.needs_calibration,
        "options": [
            {
                "name": key,
                "required": field.is_required(),
                "default": None if field.is_required() else field.get_default(call_default_factory=True),
                "description": field.description or "",
            }
            for key, field in method.Options.model_fields.items()
        ],
    }
