"""Edits that are held to a grid: which of them change a code, where they end, and that the grid stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import BadInput
from compress.pipeline.plan import make_plan, open_model
from compress.pipeline.recipe import parse_recipe
from compress.unlearning.parts.floor import Floor, salient
from compress.unlearning.parts.grid import Grid


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([4, 8, -1]),
    size=st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**31),
)
def test_edits_are_what_was_trained_but_for_those_that_reach_another_bin(
    bits: int, group: int, size: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(6, 16, generator=generator)
    after = before + size * torch.randn(6, 16, generator=generator)
    grid = Grid(bits, group)
    settled = grid.settled(before, after)
    old, new = grid.codes(before), grid.codes(settled)
    assert torch.equal(old.scales, new.scales)  # the grid itself stays
    assert torch.equal(old.zeros, new.zeros)
    moved, crossed = settled != before, old.codes != new.codes
    assert (moved | ~crossed).all()
    assert ((settled - before)[moved].sign() == (after - before)[moved].sign()).all()
    inner = (new.codes > 0) & (new.codes < 2**bits - 1)  # the outermost bins reach beyond the grid
    step = new.scales.repeat_interleave(16 // new.scales.shape[1], 1).abs()
    away = (settled - new.dequantize()).abs() / step
    assert (away[crossed & inner] < 1e-3).all()
    assert (away < 0.5 + 1e-3).all()
    assert torch.equal(settled[moved & ~crossed & inner], after[moved & ~crossed & inner])


def test_an_edit_that_reaches_another_bin_ends_in_its_middle_and_others_stay():
    # One group from 0 to 15: codes are 0 to 15 in steps of 1, and 7.2 lies .3 below the edge of its bin.
    before = torch.tensor([[0.0, 7.2, 3.0, 15.0]])
    grid = Grid(4, 4)
    for reached, ends in ((7.45, 7.45), (7.55, 8.0), (6.45, 6.0), (9.1, 9.0), (99.0, 15.0)):
        settled = grid.settled(before, torch.tensor([[0.0, reached, 3.0, 15.0]]))
        assert settled.tolist() == [[0.0, pytest.approx(ends), 3.0, 15.0]]
    assert torch.equal(grid.settled(before, torch.tensor([[1.0, 7.2, 3.0, 9.0]])), before)  # ends are held
    assert grid.movable(before).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("text", ["int4", "int9:64", "4:64", "int4:0", "int4:x", "int4:64:1"])
def test_a_grid_that_is_none_is_refused(text: str):
    with pytest.raises(BadInput, match="is not a grid; write int and the bits"):
        Grid.parse(text)


def test_grids_are_read():
    assert Grid.parse("int4:64") == Grid(4, 64)
    assert Grid.parse("int3:channel") == Grid(3, -1)


def test_the_most_salient_weights_are_those_that_matter_for_one_set_alone():
    forget = {"w": torch.tensor([[4.0, 4.0, 1.0, 0.0]])}
    retain = {"w": torch.tensor([[0.0, 4.0, 0.0, 0.0]])}
    assert salient(forget, retain, 0.25)["w"].tolist() == [[True, False, False, False]]
    assert salient(forget, retain, 0.5)["w"].sum() == 2
    assert salient(forget, {"w": torch.zeros(1, 4)}, 0.5)["w"].tolist() == [[True, True, False, False]]


def test_the_rounded_weight_is_used_while_it_is_on_and_the_gradient_passes():
    linear = nn.Linear(8, 4, bias=False)
    plain = linear.weight.detach().clone()
    floor = Floor(Grid(2, 8), {"linear": linear})
    assert torch.equal(linear.weight, plain)
    floor.roundings["linear"].on = True
    assert torch.allclose(linear.weight, Grid(2, 8).codes(plain).dequantize(), atol=1e-6)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1] = True
    floor.restrict({"linear": mask})
    linear(torch.ones(1, 8)).sum().backward()
    (weight,) = floor.weights().values()
    assert torch.equal(weight.grad, mask.float())
    assert floor.finish() == {"edits": 0, "crossed": 0, "weights": 32}
    assert torch.equal(linear.weight, plain)
    assert isinstance(linear.weight, nn.Parameter)


def test_groups_that_do_not_fit_are_refused_in_the_plan(shared_decoder: Callable[..., Path]):
    sets = {"forget": "people:forget", "retain": "people:retain"}
    step = {"method": "npo", **sets, "survive": "int4:24"}
    recipe = parse_recipe({"model": str(shared_decoder("LlamaForCausalLM")), "steps": [step]})
    with pytest.raises(BadInput, match="A group size of 24 does not divide the input dimension"):
        make_plan(open_model(recipe)[1], recipe.steps)
