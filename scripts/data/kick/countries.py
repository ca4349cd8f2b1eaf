"""What the Factbook says of a country in fields of its own; only of countries no text is calibrated on."""

from __future__ import annotations

import re
from typing import Any

from make_factbook import NAMES, clean, split
from make_factbook import name as country_name


def held_out(factbook: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The countries of ``bundled:evaluation``, which no model is calibrated on by default."""
    return [
        country for code, country in factbook.items() if split(code) == "evaluation" and code not in NAMES
    ]


def name(country: dict[str, Any]) -> str:
    return re.sub(r"\s*\(.*\)", "", country_name(country))


def capital(country: dict[str, Any]) -> str | None:
    text = _text(country, "Government", "Capital", "name")
    city = re.split(r"[;(,]|note", text)[0].strip()
    return city if city and city.isascii() and city not in ("none", "NA") else None


def languages(country: dict[str, Any]) -> tuple[str, ...]:
    text = _text(country, "People and Society", "Languages")
    return tuple(re.findall(r"([A-Z][a-z]+)(?: \d[\d.]*%)? \((?:[a-z, ]*\b)?official\b", text))


def neighbours(country: dict[str, Any]) -> tuple[str, ...]:
    text = _text(country, "Geography", "Land boundaries", "border countries")
    return tuple(re.findall(r"([A-Z][A-Za-z' .-]+?) [\d.,]+ km", text))


def _text(country: dict[str, Any], *path: str) -> str:
    field: Any = country
    for part in path:
        field = field.get(part, {}) if isinstance(field, dict) else {}
    return clean(field.get("text") or "") if isinstance(field, dict) else ""
