"""Numbers in recipes and on the command line: neither yes nor more than a library can count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compress.calibration.text.windows import evaluation_windows
from compress.cli import cli
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.method import MethodOptions
from compress.pipeline.recipe import parse_recipe, validated

RTN = {"method": "rtn"}


@pytest.mark.parametrize(
    "data",
    [
        {"steps": [{"method": "shortgpt", "layers": True}]},
        {"steps": [{"method": "gptq", "damping": True}]},
        {"steps": [{"method": "rtn", "group_size": True}]},
        {"steps": [{"method": "blockpruner", "blocks": True}]},
        {"steps": [RTN], "calibration": {"nsamples": True}},
        {"steps": [RTN], "seed": False},
    ],
)
def test_yes_is_no_number(data: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"should be a number, not yes or no.*\(got (True|False)\)"):
        parse_recipe({"model": "demo", **data})


def test_yes_is_what_it_was_elsewhere() -> None:
    (_, options), *_ = parse_recipe({"model": "demo", "steps": [{**RTN, "symmetric": False}]}).steps
    assert options.model_dump()["symmetric"] is False

    class Either(MethodOptions):
        value: bool | int

    assert validated(Either, {"value": True}, "here").value is True


@pytest.mark.parametrize("seed", [2**63, -(2**64)])
def test_numbers_that_are_too_large_are_refused(seed: int) -> None:
    with pytest.raises(BadInput, match="seed: Input should be at most"):
        parse_recipe({"model": "demo", "steps": [RTN], "seed": seed})
    with pytest.raises(BadInput, match=r"calibration.nsamples: Input should be at most"):
        parse_recipe({"model": "demo", "steps": [RTN], "calibration": {"nsamples": 2**63}})


def test_the_largest_seed_is_one() -> None:
    recipe = parse_recipe({"model": "demo", "steps": [RTN], "seed": 2**32 - 1})
    torch.Generator().manual_seed(recipe.seed)
    np.random.RandomState(recipe.seed)  # transformers seeds it, and it takes no larger one


def test_more_windows_than_there_can_be(shared_decoder: Callable[..., Path]) -> None:
    model = shared_decoder()
    tokenizer, text = load_tokenizer(model), str(model.with_name("text.txt"))
    assert len(evaluation_windows(tokenizer, text, 64, 2**63 - 1)) == len(
        evaluation_windows(tokenizer, text, 64)
    )
    done = CliRunner().invoke(cli, ["evaluate", str(model), "--windows", str(2**63)])
    assert done.exit_code == 2
    assert "is not in the range" in done.output
