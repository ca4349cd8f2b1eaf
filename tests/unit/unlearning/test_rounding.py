"""Training through the rounding of later steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.engine.loading import assemble
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.pipeline.plan import make_plan, open_model
from compress.pipeline.recipe import parse_recipe
from compress.storage.checkpoint import Checkpoint
from compress.unlearning.parts.grid import Grid
from compress.unlearning.parts.rounding import Roundings


@pytest.mark.parametrize("text", ["int4", "int9:64", "4:64", "int4:0", "int4:x", "int4:64:1"])
def test_a_grid_that_is_none_is_refused(text: str):
    with pytest.raises(BadInput, match="is not a grid; write int and the bits"):
        Grid.parse(text)


def test_grids_are_read():
    assert Grid.parse("int4:64") == Grid(4, 64)
    assert Grid.parse("int3:channel") == Grid(3, -1)


def test_the_steps_of_a_training_take_turns_and_gradients_pass():
    linear = nn.Linear(8, 4, bias=False)
    plain = linear.weight.detach().clone()
    roundings = Roundings(["int2:8", "int4:4"], {"linear": linear})
    for step, grid in enumerate((None, Grid(2, 8), Grid(4, 4), None, Grid(2, 8))):
        roundings.turn(step)
        expected = plain if grid is None else grid.codes(plain).dequantize()
        assert torch.allclose(linear.weight, expected, atol=1e-6)
        linear(torch.ones(1, 8)).sum().backward()
        (weight,) = linear.parameters()
        assert torch.equal(weight.grad, torch.full((4, 8), step + 1.0))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_codes_that_changed_are_counted_and_the_model_is_plain_again(
    shared_decoder: Callable[..., Path], name: str
):
    model = StreamedModel(Checkpoint.open(shared_decoder(name)), "cpu")
    whole = assemble(model.checkpoint, "cpu", torch.float32).requires_grad_(True)
    names = {key for key, _ in whole.named_parameters()}
    roundings = Roundings.of(whole, model.anatomy, ["int4:8", "int2:8"])
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    assert len(trained) == len(roundings.linears) > 0
    linear = next(iter(roundings.linears.values()))
    with torch.no_grad():
        roundings.turn(2)
        (weight,) = (each for each in linear.parameters() if each.requires_grad)
        row = weight.T[0] if isinstance(linear, Conv1D) else weight[0]
        row[0], row[1:8] = 1.0, 0.0  # one group, whose codes are the largest and 7 times 0
    found = roundings.finish(model)
    assert {key for key, _ in whole.named_parameters()} == names
    assert 0 < found["int2:8"] <= found["int4:8"] <= 8


def test_without_grids_nothing_is_rounded_and_all_is_trained(shared_decoder: Callable[..., Path]):
    model = StreamedModel(Checkpoint.open(shared_decoder("LlamaForCausalLM")), "cpu")
    whole = assemble(model.checkpoint, "cpu", torch.float32).requires_grad_(True)
    roundings = Roundings.of(whole, model.anatomy, [])
    roundings.turn(1)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert roundings.finish(model) == {}


def test_groups_that_do_not_fit_are_refused_in_the_plan(shared_decoder: Callable[..., Path]):
    sets = {"forget": "people:forget", "retain": "people:retain"}
    step = {"method": "npo", **sets, "survive": ["int4:32", "int4:24"]}
    recipe = parse_recipe({"model": str(shared_decoder("LlamaForCausalLM")), "steps": [step]})
    with pytest.raises(BadInput, match="A group size of 24 does not divide the input dimension"):
        make_plan(open_model(recipe)[1], recipe.steps)
