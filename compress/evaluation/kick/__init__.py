"""LLM-KICK (arXiv:2310.01382) as tasks of lm-eval: what perplexity does not show.

``kick`` asks offline, with questions bundled here; ``kick-hub`` asks those of the paper, which `datasets`
fetches. Both have the same prompts and scorers (:mod:`compress.evaluation.kick.scorers`).

Each task's ``metadata`` names the metric that decides and what a guess gets: for choices one in four, else
the best answer that is the same for every question. ``kick_choice_letter`` is in no suite: it asks for a
letter, as published, and small models name the same letter everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).parent / "tasks"
"""The include path for lm-eval's ``TaskManager``."""

OFFLINE = (
    "kick_factoid",
    "kick_choice",
    "kick_choice_words",
    "kick_closed",
    "kick_open",
    "kick_summary",
    "kick_instruct",
)


@dataclass(frozen=True)
class Suite:
    """Tasks that are asked together.

    Attributes:
        tasks: their names in lm-eval.
        limit: how many questions of each task are asked, from the first; None asks all. The bundled questions
            are in an order drawn by a seed, so the first ones are a fair share.
    """

    tasks: tuple[str, ...]
    limit: int | None = None


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "quick": Suite(OFFLINE, limit=40),
        "kick": Suite(OFFLINE),
        "kick-hub": Suite(("kick_hub",)),
    }
)
"""By the name that ``--suite`` takes."""
