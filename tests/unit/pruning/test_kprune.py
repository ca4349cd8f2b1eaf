"""K-prune by default: a head stays in every layer; on request a layer may lose everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.pruning.kprune import KPrune
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import Lineage

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture
def idle(tiny_decoder: Callable[..., Path]) -> Path:
    """A model whose first layer adds nothing."""
    folder = tiny_decoder(num_hidden_layers=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in OUTPUTS:
        tensors[f"model.layers.0.{name}"].zero_()
    save_file(tensors, file, {"format": "pt"})
    return folder


def pruned(model: Path, output: Path, **options: object) -> Lineage:
    calibration = {"source": str(model.with_name("text.txt")), "nsamples": 4, "seqlen": 32}
    step = {"method": "kprune", "ratio": 0.3, **options}
    return execute(parse_recipe({"model": str(model), "calibration": calibration, "steps": [step]}), output)


def test_a_first_layer_without_anything_left(idle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    details = pruned(idle, output, ratio=0.4, min_heads=0).steps[0].details
    assert (details["heads"][0], details["neurons"][0]) == (0, 0)
    assert not any(name.startswith("model.layers.0.") for name in Checkpoint.open(output).tensors)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert compress.load(output)(tokens).logits.isfinite().all()


def test_every_layer_keeps_a_head_by_default(idle: Path, tmp_path: Path) -> None:
    details = pruned(idle, tmp_path / "out").steps[0].details
    assert min(details["heads"]) == 1
    assert all(neurons % 8 == 0 for neurons in details["neurons"])  # 96 neurons: an eighth, rounded down
    assert details["flops_after"] <= 0.7 * details["flops_before"]


def test_heads_that_take_more_than_is_left_are_refused_in_the_plan(tiny_decoder: Callable[..., Path]) -> None:
    shape = ModelShape.of(Checkpoint.open(tiny_decoder()))
    KPrune().plan(shape, KPrune.Options(ratio=0.5, min_heads=2))
    with pytest.raises(BadInput, match="the 2 key-value heads that every layer keeps take"):
        KPrune().plan(shape, KPrune.Options(ratio=0.8, min_heads=2))


def test_heads_that_take_more_than_is_left_at_the_length_of_the_text_are_refused(
    tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_decoder(intermediate_size=48)
    KPrune().plan(ModelShape.of(Checkpoint.open(model)), KPrune.Options(ratio=0.4, min_heads=2))
    with pytest.raises(BadInput, match="the 2 key-value heads that every layer keeps take"):
        pruned(model, tmp_path / "out", ratio=0.4, min_heads=2)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_plan_is_near_the_ratio(tiny_decoder: Callable[..., Path], ratio: float) -> None:
    shape = ModelShape.of(Checkpoint.open(tiny_decoder(intermediate_size=512, num_hidden_layers=4)))
    planned = KPrune().plan(shape, KPrune.Options(ratio=ratio))
    before, after = (sum(out * width for out, width in each.linears().values()) for each in (shape, planned))
    assert 1 - after / before == pytest.approx(ratio, abs=0.1)
    assert planned.is_pruned
