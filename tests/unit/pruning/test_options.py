"""Options of the pruning methods: one vocabulary, and old names that say the new one."""

from __future__ import annotations

import pytest

from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.registry import find_method, methods_of

REQUIRED = {
    "blockpruner": {},
    "flap": {"ratio": 0.2},
    "kprune": {"ratio": 0.2},
    "replaceme": {"layers": 2},
}
RENAMED = [
    ("blockpruner", "keep_ratio", 0.8, "ratio", 0.2),
    ("flap", "ridge", 0.5, "damping", 0.5),
    ("kprune", "ridge", 0.5, "damping", 0.5),
    ("replaceme", "batch_tokens", 512, "batch_size", 512),
]


@pytest.mark.parametrize(("method", "old", "old_value", "new", "value"), RENAMED)
def test_an_old_name_is_an_error_that_says_the_new_one(
    method: str, old: str, old_value: float, new: str, value: float
):
    step = {"method": method, **REQUIRED[method]}
    with pytest.raises(BadInput, match=f"the option '{old}' is now called '{new}'") as caught:
        parse_recipe({"model": "demo", "steps": [{**step, old: old_value}]})
    assert str(caught.value).endswith(".")
    ((_, options),) = parse_recipe({"model": "demo", "steps": [{**step, new: value}]}).steps
    assert getattr(options, new) == value


def test_an_option_whose_meaning_changed_says_how():
    with pytest.raises(BadInput, match="the share to remove: 1 - keep_ratio"):
        parse_recipe({"model": "demo", "steps": [{"method": "blockpruner", "keep_ratio": 0.8}]})


def test_all_renamed_options_are_tested():
    declared = {
        (name, old, renamed.partition(",")[0])
        for name in methods_of("pruning")
        for old, renamed in find_method(name).Options.renamed.items()
    }
    assert declared == {(method, old, new) for method, old, _, new, _ in RENAMED}


@pytest.mark.parametrize("name", methods_of("pruning"))
def test_options_have_the_names_of_the_vocabulary(name: str):
    fields = find_method(name).Options.model_fields
    assert not {"keep_ratio", "ridge", "batch", "batch_tokens", "lora_rank", "clip_lr"} & set(fields)
    assert all(field.description for field in fields.values())
