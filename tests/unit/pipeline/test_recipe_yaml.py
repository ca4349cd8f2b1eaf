"""What a recipe may use of YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import BadInput
from compress.pipeline.recipe import Recipe, load_recipe


def loaded(folder: Path, steps: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(f"model: m\nsteps:\n{steps}")
    return load_recipe(file)


def test_merge_keys(tmp_path: Path):
    """Also of a mapping that merges keys itself, and of several at once; what stands beside them counts."""
    recipe = loaded(
        tmp_path,
        "- &a {method: magnitude, ratio: 0.1}\n"
        "- &b {<<: *a, ratio: 0.2}\n"
        "- {<<: *b, ratio: 0.3}\n"
        "- {<<: [*b, *a]}\n",
    )
    assert [options.ratio for _, options in recipe.steps] == [0.1, 0.2, 0.3, 0.2]
    assert {method.name for method, _ in recipe.steps} == {"magnitude"}


@pytest.mark.parametrize(
    ("steps", "key"),
    [
        ("- {method: magnitude, ratio: 0.1, ratio: 0.2}\n", "ratio"),
        ("- &a {method: magnitude}\n- {<<: *a, ratio: 0.3, ratio: 0.4}\n", "ratio"),
        ("- &a {method: magnitude}\n- {<<: *a, <<: *a}\n", "<<"),
        ("- {method: magnitude, 'ratio': 0.1, ratio: 0.2}\n", "ratio"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, steps: str, key: str):
    with pytest.raises(BadInput, match=f"'{key}' is given twice") as caught:
        loaded(tmp_path, steps)
    assert "\n" not in str(caught.value)
