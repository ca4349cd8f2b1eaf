"""The later steps that an audit takes all models through: a grid of them by name, and those of a recipe."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import BadInput, unknown
from compress.pipeline.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe
from compress.pipeline.registry import find_method

log = logging.getLogger(__name__)

Step = dict[str, Any]
"""A step of a recipe as plain data."""

STEPS: dict[str, Step] = {
    "int8": {"method": "rtn", "bits": 8},
    "int4": {"method": "rtn", "bits": 4},
    "gptq": {"method": "gptq", "bits": 4},
    "awq": {"method": "awq", "bits": 4},
    "nf4": {"method": "nf4"},
    "int3": {"method": "rtn", "bits": 3},
    "int2": {"method": "rtn", "bits": 2},
    "prune20": {"method": "flap", "ratio": 0.2},
    "prune50": {"method": "flap", "ratio": 0.5},
}
"""Name -> step. The int ones round to the nearest; pruning is FLAP, which leaves more of what a model knows
than cruder ways, so that there is something to recover. A group size may follow (``int4:64``), and names are
joined by a plus sign (``prune20+int4``)."""

GRID = (*STEPS, "prune20+int4")
"""What an audit takes models through where nothing else is asked for."""

RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Way:
    """Later steps that are done to all models.

    Attributes:
        name: for people.
        steps: in the order they are done; none for full precision.
        made: a folder that already holds the unlearned model after these steps.
        utility: whether it is asked what the models are good for, which takes most of the time.
    """

    name: str
    steps: tuple[Step, ...] = ()
    made: Path | None = None
    utility: bool = False

    @property
    def packs_alone(self) -> bool:
        """Whether weights are rounded and nothing is taken away before, so that codes can be compared."""
        families = [find_method(step["method"]).family for step in self.steps]
        return families == ["quantization"]


FULL = Way("full precision", utility=True)


def ways_named(names: Sequence[str]) -> list[Way]:
    """The ways that names stand for: of `STEPS`, joined by plus signs, or recipes with their later steps.

    Raises:
        BadInput: a name is unknown, or the steps do not go together.
    """
    found: list[Way] = []
    for name in names:
        # Names of steps come first, because bundled recipes have some of them, too.
        if name.endswith(RECIPES) or (name in bundled_recipes() and name not in STEPS):
            recipe = load_recipe(name, {"model": "demo"})
            found += ways_of(later_steps(recipe))
        else:
            found.append(_named(name))
    return list({way.name: way for way in found}.values())


def usual_ways() -> list[Way]:
    """The ways of `GRID` that can be gone here; what is left out for want of a library is logged."""
    found = []
    for way in ways_named(GRID):
        packages = [find_method(step["method"]).needs_package for step in way.steps]
        missing = [name for name in packages if name and importlib.util.find_spec(name) is None]
        if missing:
            log.warning(
                "%s is left out of the audit, because %s is not installed; 'pip install compress-model[%s]' "
                "brings it.",
                *(way.name, missing[0], missing[0]),
            )
        else:
            found.append(way)
    return found


def later_steps(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe behind its last one of unlearning, with all their options."""
    steps = recipe.resolved()["steps"]
    last = max((n for n, (method, _) in enumerate(recipe.steps) if method.family == "unlearning"), default=-1)
    return tuple(steps[last + 1 :])


def ways_of(steps: Sequence[Step], made: Path | None = None) -> list[Way]:
    """A way for each step of a recipe, with those before it; the last one may be ``made`` already."""
    ways = []
    for count in range(1, len(steps) + 1):
        name = "recipe: " + "+".join(step["method"] for step in steps[:count])
        last = made if count == len(steps) else None
        ways.append(Way(name, tuple(steps[:count]), last, utility=True))
    return ways


def _named(name: str) -> Way:
    steps = []
    for part in name.split("+"):
        key, colon, size = part.strip().partition(":")
        if key not in STEPS:
            raise unknown("later step", key, [*STEPS, "prune20+int4"])
        step = dict(STEPS[key])
        if colon:
            if re.fullmatch(r"[1-9]\d*|channel", size) is None or step["method"] in ("nf4", "flap"):
                raise BadInput(f"'{part}' has no group size; write for example int4:64.")
            step["group_size"] = int(size) if size.isdecimal() else size
        steps.append(step)
    parse_recipe({"model": "demo", "steps": steps})  # which refuses an unsound order
    return Way(name, tuple(steps))
