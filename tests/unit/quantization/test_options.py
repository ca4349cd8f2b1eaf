"""The options that quantization methods share, and those that had other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from compress.cli import cli
from compress.errors import BadInput
from compress.pipeline.recipe import Recipe, parse_recipe
from compress.pipeline.registry import find_method, methods_of
from compress.quantization.parts.state import StatePart

RENAMED = [
    (name, old, new)
    for name in methods_of("quantization")
    for old, new in find_method(name).Options.renamed.items()
]


def recipe(method: str, **options: Any) -> Recipe:
    return parse_recipe({"model": "model", "steps": [{"method": method, **options}]})


@pytest.mark.parametrize(("method", "old", "new"), RENAMED)
def test_an_old_name_is_an_error_that_says_the_new_one(method: str, old: str, new: str) -> None:
    with pytest.raises(BadInput, match=f"the option '{old}' is now called '{new}'"):
        recipe(method, **{old: 4})
    fields = find_method(method).Options.model_fields
    assert new in fields
    assert old not in fields


def test_the_same_thing_has_one_name_in_all_methods() -> None:
    assert {(method, old) for method, old, _ in RENAMED} == {
        ("apiq", "batch"),
        ("apiq", "clip_lr"),
        ("apiq", "lora_lr"),
        ("llm-qat", "weight_bits"),
        ("llm-qat", "lora_rank"),
    }
    old_names = {old for _, old, _ in RENAMED}
    for name in methods_of("quantization"):
        fields = find_method(name).Options.model_fields
        assert "ignore" in fields
        assert not old_names & set(fields)
    assert recipe("llm-qat", bits=3, rank=4).steps[0][1].model_dump()["bits"] == 3
    for name in ("rtn", "hqq", "awq", "gptq", "apiq", "llm-qat", "nested"):
        assert recipe(name, bits=4).steps[0][1].model_dump()["bits"] == 4


def test_the_command_line_has_the_new_names(shared_decoder: Callable[..., Path]) -> None:
    def quantize(*words: str) -> Result:
        command = ["quantize", str(shared_decoder()), "--method", "llm-qat", *words, "--dry-run"]
        return CliRunner().invoke(cli, command)

    refused = quantize("--weight-bits", "4")
    assert isinstance(refused.exception, BadInput) or refused.exit_code == 2
    assert "is now called '--bits'" in f"{refused.output} {refused.exception}"
    assert quantize("--bits", "4").exit_code == 0


def test_results_of_two_kinds_in_one_state() -> None:
    state: dict[str, torch.Tensor] = {}
    errors, losses = StatePart(state, "weight error"), StatePart(state, "loss")
    errors["layers.0.up"], losses["0"] = torch.tensor(1.0), torch.tensor(2.0)
    assert dict(errors) == {"layers.0.up": torch.tensor(1.0)}
    assert dict(losses) == {"0": torch.tensor(2.0)}
    saved = dict(state)
    state.clear()
    assert not errors
    state.update(saved)  # as a journal does when it is restored
    assert (len(errors), float(losses["0"])) == (1, 2.0)
    del errors["layers.0.up"]
    assert list(state) == ["loss/0"]
