"""Names of config.json from before transformers 5."""

from __future__ import annotations

from typing import Any

import pytest

from compress.export.legacy import with_rope


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 4.0}}, {}),
        ({"hidden_size": 8}, {}),
    ],
)
def test_old_names_stand_beside_the_new_ones(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert with_rope(given) == {**wanted, **given}
