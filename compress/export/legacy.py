"""Entries of config.json under the names from before transformers 5, which other programs still read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with ``rope_theta`` and the like beside ``rope_parameters``.

    Programs that know only the old names would take the default of the architecture, and compute something
    else without a word. What is there already stays.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return dict(config)
    by_kind = {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}
    whole = by_kind.get("full_attention", rope if not by_kind else {})
    old: dict[str, Any] = {}
    if "rope_theta" in whole:
        old["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
    if "rope_theta" in (sliding := by_kind.get("sliding_attention", {})):
        old["rope_local_base_freq"] = sliding["rope_theta"]
    return {**old, **config}
