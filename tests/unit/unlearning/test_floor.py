"""Edits that are held to a grid: what is carried over the edge of its bin, and what is taken back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import BadInput
from compress.unlearning.parts.floor import Floor, salient
from compress.unlearning.parts.grid import ENOUGH, Grid


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([4, 8, -1]),
    size=st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**31),
)
def test_every_edit_that_is_left_changes_its_code_and_no_other_weight_moves(
    bits: int, group: int, size: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(6, 16, generator=generator)
    after = before + size * torch.randn(6, 16, generator=generator)
    grid = Grid(bits, group)
    floored = grid.floored(before, after)
    old, new = grid.codes(before), grid.codes(floored)
    assert torch.equal(old.scales, new.scales)  # the grid itself stays
    assert torch.equal(old.zeros, new.zeros)
    assert torch.equal(floored != before, old.codes != new.codes)
    moved = floored != before
    assert ((floored - before)[moved].sign() == (after - before)[moved].sign()).all()


def test_an_edit_is_carried_or_taken_back_by_how_far_it_went():
    # One group from 0 to 15: codes are 0 to 15 in steps of 1, and 7.2 lies .3 below the edge of its bin.
    before = torch.tensor([[0.0, 7.2, 3.0, 15.0]])
    grid = Grid(4, 4)
    near, far = 7.2 + 0.3 * (ENOUGH + 0.01), 7.2 + 0.3 * (ENOUGH - 0.01)
    assert torch.allclose(
        grid.floored(before, torch.tensor([[0.0, near, 3.0, 15.0]]))[0, 1], torch.tensor(7.6)
    )
    assert grid.floored(before, torch.tensor([[0.0, far, 3.0, 15.0]]))[0, 1] == before[0, 1]
    assert torch.equal(
        grid.floored(before, torch.tensor([[1.0, 7.2, 3.0, 9.0]])), before
    )  # the ends are held
    assert grid.floored(before, torch.tensor([[0.0, 9.1, 3.0, 15.0]]))[0, 1] == torch.tensor(
        9.1
    )  # far enough


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
