"""Every kind of pruned artefact, quantized: its structure stays, and it computes what its codes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

import compress
from compress.anatomy import layer_shapes, weight
from compress.engine.shape import ModelShape
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.table import Formats

PRUNED = {
    "heterogeneous": {"method": "flap", "ratio": 0.3, "width_multiple": 16},
    "uniform": {"method": "flap", "ratio": 0.3, "width_multiple": 16, "shape": "uniform"},
    "blocks": {"method": "blockpruner", "blocks": 3},
    "layers": {"method": "shortgpt", "layers": 1},
    "folded": {"method": "replaceme", "layers": 1, "transform": "least-squares"},
}
TOKENS = torch.arange(48).view(2, 24)


@pytest.fixture(scope="session")
def dense(shared_decoder: Callable[..., Path]) -> Path:
    return shared_decoder(hidden_size=32, num_hidden_layers=4, tie_word_embeddings=True)


def done(model: Path, output: Path, text: Path, **step: object) -> Path:
    calibration = {"source": str(text), "nsamples": 4, "seqlen": 32}
    execute(parse_recipe({"model": str(model), "calibration": calibration, "steps": [step]}), output)
    return output


@pytest.fixture(scope="module", params=PRUNED)
def pruned(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "pruned"
    return done(dense, output, dense.with_name("text.txt"), **PRUNED[request.param])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_is_quantized_as_it_is(method: str, dense: Path, pruned: Path, tmp_path: Path) -> None:
    step = {"method": method, "group_size": 16, "set": {"*.down_proj": 8}, "ignore": ["*.o_proj"]}
    if method == "gptq":
        step |= {"embedding_bits": 8, "symmetric": False}
    packed = done(pruned, tmp_path / "packed", dense.with_name("text.txt"), **step)

    shape, before = (ModelShape.of(Checkpoint.open(folder)) for folder in (packed, pruned))
    assert layer_shapes(shape.pretrained_config) == layer_shapes(before.pretrained_config)
    assert shape.parameters == before.parameters
    assert shape.nbytes < 0.6 * before.nbytes

    expected, stored = compress.load(pruned), Checkpoint.open(packed)
    formats = Formats(shape.config["quantization_config"])
    names = [name.removesuffix(".weight_packed") for name in stored.tensors if name.endswith("_packed")]
    assert {name for name in names if ".layers." in name} == {
        name for name in before.linears() if not name.endswith("o_proj")
    }
    for name in names:
        old = weight(expected.get_submodule(name))
        new = formats.of(name, "Embedding" if "embed" in name else "Linear").read(name, stored.read)
        assert new.bits == (8 if "down" in name or "embed" in name else 4)
        assert float((new.dequantize() - old).norm()) < 0.2 * float(old.norm())
        expected.get_submodule(name).weight.data = new.dequantize()
    ours, wanted = logits(compress.load(packed)), logits(expected)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    if method == "rtn":
        assert str(shape.loads_with).startswith("transformers with compressed-tensors")
        theirs = hf.AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=shape.is_pruned)
        torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    else:
        assert str(shape.loads_with) == "compress-model only"
