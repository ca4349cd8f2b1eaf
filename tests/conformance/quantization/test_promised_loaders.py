"""Every loader that is promised computes what `compress.load` does: artefacts of ours, checked by themselves.

`compress.run` loads each result with the promised programs, and fails if these compute something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.engine.shape import ModelShape
from compress.errors import CompressError
from compress.pipeline import promise
from compress.pipeline.promise import obstacle, promised_logits
from compress.pipeline.reload import HALF_PRECISION, SAME_ARITHMETIC
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import read_lineage

pytestmark = pytest.mark.loaders

Decoder = Callable[..., Path]
ROUNDED = {"method": "rtn", "bits": 4, "group_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Gemma3ForCausalLM": {"head_dim": 32},
    "OPTForCausalLM": {},
}
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {**ROUNDED, "format": "compressed-tensors"},
    "fp8": {"method": "float", "type": "fp8"},
    "mxfp4": {"method": "float", "type": "mxfp4"},
    "nvfp4": {"method": "float", "type": "nvfp4"},
    "nf4": {"method": "nf4"},
    "llm-int8": {"method": "llm-int8"},
    "gptq": {**ROUNDED, "format": "gptq"},
}
NEEDS = {"nf4": "bitsandbytes", "llm-int8": "bitsandbytes", "gptq": "gptqmodel"}


def made(model: Path, step: dict[str, Any], output: Path) -> Path:
    compress.run({"model": str(model), "steps": [step]}, output)
    return output


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std(correction=0))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_promised_loader_computes_the_same(
    architecture: str, form: str, shared_decoder: Decoder, tmp_path: Path
) -> None:
    if (package := NEEDS.get(form)) and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "gptqmodel" and find_spec("optimum") is None:
        pytest.skip("optimum is not installed")
    sizes = {"hidden_size": 128, **ARCHITECTURES[architecture]}
    sizes["ffn_dim" if architecture == "OPTForCausalLM" else "intermediate_size"] = 192
    if architecture == "OPTForCausalLM":
        sizes["word_embed_proj_dim"] = 128
    folder = made(shared_decoder(architecture, **sizes), FORMATS[form], tmp_path / form)

    shape, trial = ModelShape.of(Checkpoint.open(folder)), read_lineage(folder).reload.promised
    tolerance = HALF_PRECISION if shape.loads_with.in_half_precision else SAME_ARITHMETIC
    assert trial.not_tried is None
    assert trial.difference <= tolerance
    if package is None:  # in this process, so it takes no time to compare with the whole model as well
        tokens = torch.arange(1, 33).view(2, 16)
        with torch.no_grad():
            ours = compress.load(folder, dtype="float32")(tokens).logits
        assert distance(promised_logits(folder, tokens), ours) <= tolerance
    assert trial.loader.partition(" ")[0] == (
        "compress-model" if (architecture, form) == ("OPTForCausalLM", "fp8") else "transformers"
    )


def test_a_loader_that_reads_something_else_fails_the_run(
    shared_decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind of fault of names unlike the class: all linears in 'ignore', which the loader then fills at
    random and we never see."""
    from compress.pipeline import run

    write_model = run.write_model

    def breaking(checkpoint: Any, source: Path, folder: Path, recipe: Any) -> dict[str, str]:
        files = write_model(checkpoint, source, folder, recipe)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["ignore"] += ["re:.*"]
        del config["quantization_config"]["dequantize"]  # with which transformers does not look at 'ignore'
        (folder / "config.json").write_text(json.dumps(config))
        return files

    monkeypatch.setattr(run, "write_model", breaking)
    with pytest.raises(CompressError, match=r"with transformers .* nothing was published"):
        made(shared_decoder(), FORMATS["compressed-tensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_why_a_loader_is_not_tried(
    shared_decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_decoder()
    found = {"transformers": "5.24.0", "compressed-tensors": "0.2"}
    monkeypatch.setattr(promise, "_version", found.get)
    folder = made(model, FORMATS["compressed-tensors"], tmp_path / "old")
    trial = read_lineage(folder).reload.promised
    assert trial.difference is None
    assert "compressed-tensors 0.2 is installed, and >=" in trial.not_tried
    assert "not tried here, because compressed-tensors 0.2" in (folder / "README.md").read_text()
    del found["compressed-tensors"]
    shape = ModelShape.of(Checkpoint.open(folder))
    assert obstacle(shape) == "compressed-tensors is not installed"
    monkeypatch.undo()
    assert obstacle(shape) is None
    monkeypatch.setattr(promise, "available_memory", lambda: 4 * shape.parameters)
    assert "over a quarter of the free" in obstacle(shape)
    monkeypatch.undo()
    assert "not tried here, because" not in str(
        read_lineage(made(model, {"method": "nested"}, tmp_path / "blocks")).reload.promised
    )


def test_a_loader_in_a_process_of_its_own_that_fails_says_why(
    shared_decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(shared_decoder(), FORMATS["compressed-tensors"], tmp_path / "out")
    tokens = torch.arange(1, 9)[None]
    here = promised_logits(folder, tokens)
    monkeypatch.setattr(promise, "IN_THIS_PROCESS", set())
    assert torch.equal(promised_logits(folder, tokens), here)
    monkeypatch.setattr(promise.sys, "executable", "/bin/false")
    with pytest.raises(CompressError, match=r"does not load with transformers .*\(exit code 1\)"):
        promised_logits(folder, tokens)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "GPTNeoXForCausalLM", "Phi3ForCausalLM"])
def test_the_anatomy_knows_which_linears_are_given_rows(architecture: str, shared_decoder: Decoder) -> None:
    folder = shared_decoder(architecture, **ARCHITECTURES.get(architecture, {}))
    model, anatomy = compress.load(folder), ModelShape.of(Checkpoint.open(folder)).anatomy
    seen = {}
    for path, linear in anatomy.linears(model.base_model.get_submodule(anatomy.layers)[0]).items():
        linear.register_forward_pre_hook(lambda _, given, path=path: seen.update({path: given[0].ndim}))
    model(torch.arange(1, 9)[None])
    assert {path for path, ndim in seen.items() if ndim == 2} == (
        {anatomy.up, anatomy.down} if anatomy.flat_mlp else set()
    )


@pytest.mark.parametrize(("bits", "who"), [(8, "transformers "), (6, "compress-model ")])
def test_inputs_on_another_grid_are_promised_only_where_it_is_fine(
    bits: int, who: str, shared_decoder: Decoder, tmp_path: Path
) -> None:
    model = shared_decoder()
    step = {"method": "llm-qat", "steps": 0, "activation_bits": bits, "kv_bits": 4}
    text = {"source": str(model.parent / "text.txt"), "nsamples": 2, "seqlen": 16}
    lineage = compress.run({"model": str(model), "calibration": text, "steps": [step]}, tmp_path / "out")
    trial = lineage.reload.promised
    assert trial.loader.startswith(who)
    assert trial.difference <= HALF_PRECISION
