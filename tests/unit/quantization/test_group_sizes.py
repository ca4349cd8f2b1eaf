"""Group sizes that fit all widths of a model, and the sizes that an error suggests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import parse_recipe
from compress.pruning.parts.width import Kept, plan_widths
from compress.quantization.parts.layout import plan_layout
from compress.quantization.parts.options import WeightOptions
from compress.storage.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("widths", "size"),
    [((576, 1536), 64), ((576, 1248), 32), ((64, 1232), 16), ((64, 1240), 8), ((2048,), 64)],
)
def test_auto_is_the_largest_size_up_to_64_that_fits_everything(widths: tuple[int, ...], size: int) -> None:
    named = {str(number): width for number, width in enumerate(widths)}
    assert WeightOptions().group_length(named) == size
    assert WeightOptions(group_size="channel").group_length(named) == -1


def test_the_sizes_that_the_error_names_work_for_the_whole_model(shared_decoder: Callable[..., Path]) -> None:
    import torch

    dense = ModelShape.of(Checkpoint.open(shared_decoder(intermediate_size=1536)))
    kept = [Kept(torch.arange(2), torch.arange(neurons)) for neurons in (1248, 1232)]
    shape = plan_widths(dense, kept)
    with pytest.raises(BadInput, match="128 does not divide the input dimension") as caught:
        plan_layout(shape, WeightOptions(group_size=128))
    sizes = re.findall(r"use (.*) for all linears", str(caught.value))[0].replace(",", " or").split(" or ")
    assert sizes == ["8", "16", "channel"]
    for size in sizes:
        layout = plan_layout(shape, WeightOptions(group_size=size if size == "channel" else int(size)))
        assert len(layout.linears) == 14
    assert plan_layout(shape, WeightOptions()).default.group_size == 16


def test_groups_of_float_types_that_do_not_fit(shared_decoder: Callable[..., Path]) -> None:
    dense = shared_decoder(intermediate_size=88)
    checkpoint = Checkpoint.open(dense)

    def plan(**options: object) -> None:
        steps = parse_recipe({"model": str(dense), "steps": [{"method": "float", **options}]}).steps
        make_plan(checkpoint, steps)

    for kind, inputs in (("mxfp4", 32), ("nvfp4", 16)):
        with pytest.raises(BadInput, match=f"have {inputs} inputs, and the 88 inputs of .*use the type fp8"):
            plan(type=kind)
        plan(type=kind, ignore=["*.down_proj"])
    plan(type="fp8")


def test_widths_that_no_group_fits(shared_decoder: Callable[..., Path]) -> None:
    dense = shared_decoder(intermediate_size=90)
    checkpoint = Checkpoint.open(dense)

    def plan(**options: object) -> None:
        steps = parse_recipe({"model": str(dense), "steps": [{"method": "rtn", **options}]}).steps
        make_plan(checkpoint, steps)

    with pytest.raises(BadInput, match=r"8 does not divide .* 90 of .*down_proj'; use channel for all"):
        plan()
    plan(group_size="channel")
    plan(ignore=["*.down_proj"])
