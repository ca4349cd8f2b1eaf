"""GPTQ through the command line's way: every architecture, packed, loaded again, resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compress
from compress.engine import activations
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.method import StepContext
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization import gptq
from compress.quantization.gptq import GPTQ
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

SIZE = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2}
# What comes beside the defaults: with fused projections nothing of a layer is left to be told apart.
CASES: dict[str, list[dict[str, Any]]] = {
    "LlamaForCausalLM": [{"true_sequential": True}, {"asymmetric_calibration": 1.0}],
    "Phi3ForCausalLM": [{"act_order": False}],
    "GPT2LMHeadModel": [{"asymmetric_calibration": 1.0}],
    "GPTNeoXForCausalLM": [{"act_order": False}],
}


def quantized(dense: Path, output: Path, method: str = "gptq", **options: object) -> Path:
    step = {"method": method, "bits": 3, "group_size": 16, "symmetric": False, **options}
    calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 64}
    execute(parse_recipe({"model": str(dense), "calibration": calibration, "steps": [step]}), output)
    return output


@torch.no_grad()
def error(dense: Path, folder: Path) -> float:
    """Mean squared error of the logits on the text."""
    text = (dense.parent / "text.txt").read_text()[:256]
    tokens = hf.AutoTokenizer.from_pretrained(dense)(text, return_tensors="pt").input_ids
    first, second = (compress.load(path)(tokens).logits for path in (dense, folder))
    return float((first - second).square().mean())


@pytest.mark.parametrize("architecture", CASES)
def test_it_is_nearer_than_rounding(
    architecture: str, shared_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    dense = shared_decoder(architecture, num_hidden_layers=3)
    nearest = error(dense, quantized(dense, tmp_path / "rtn", method="rtn"))
    for number, options in enumerate(({}, *CASES[architecture])):
        found = error(dense, quantized(dense, tmp_path / f"gptq-{number}", **options))
        assert found < 0.9 * nearest


SAME_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
OPTIONS = {"bits": 2, "group_size": 16, "symmetric": False, "asymmetric_calibration": 1.0}


def llama(folder: Path) -> tuple[Path, Windows]:
    """A model, and windows of which two are padded."""
    torch.manual_seed(1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokens = torch.randint(0, 257, (5, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 9:] = mask[4, 20:] = False
    return folder, Windows(tokens, mask, source="random")


def started(checkpoint: Checkpoint, windows: Windows, work: Path) -> StepContext:
    return StepContext(Draft(checkpoint, work), windows, 0, work, "cpu", lambda text, share: None)


@torch.no_grad()
def seen(model: torch.nn.Module, linear: str, windows: Windows) -> torch.Tensor:
    """What transformers gives to a linear at the real tokens: [tokens, in], float64."""
    given: list[torch.Tensor] = []
    hook = model.get_submodule(linear).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model(windows.tokens, attention_mask=windows.mask.long())
    hook.remove()
    return given[0][windows.mask].double()


@pytest.mark.parametrize("true_sequential", [False, True])
def test_both_streams_are_what_transformers_computes(
    true_sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows = llama(tmp_path / "dense")
    calls: list[tuple[torch.Tensor, torch.Tensor, Any]] = []

    def spy(dense: torch.Tensor, hessian: torch.Tensor, *args: Any, **how: Any) -> Any:
        rounded = original(dense, hessian, *args, **how)
        calls.append((hessian, how["difference"], rounded))
        return rounded

    original = gptq.round_by_columns
    monkeypatch.setattr(gptq, "round_by_columns", spy)
    checkpoint = Checkpoint.open(folder)
    options = GPTQ.Options(**OPTIONS, true_sequential=true_sequential)
    GPTQ().apply(StreamedModel(checkpoint), options, started(checkpoint, windows, tmp_path / "work"))

    dense = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    quantized, behind = copy.deepcopy(dense), iter(calls)
    for index in range(3):
        ready = {}
        for paths in SAME_INPUT:
            hessian, difference, rounded = next(behind)
            names = [f"model.layers.{index}.{path}" for path in paths]
            own, other = (seen(model, names[0], windows) for model in (quantized, dense))
            assert torch.allclose(hessian, own.T @ own, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()))
            wanted = (other - own).T @ own
            if index == 0 and not (true_sequential and paths != SAME_INPUT[0]):
                assert not difference.any()  # the same inputs, by the same arithmetic
            else:
                assert torch.allclose(difference, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
            rows = [len(dense.get_submodule(name).weight) for name in names]
            ready |= dict(zip(names, rounded.split(rows), strict=True))
            if true_sequential or paths == SAME_INPUT[-1]:
                for name, part in ready.items():
                    quantized.get_submodule(name).weight.data = part.dequantize()
    assert not list(behind)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["in files", "in memory"])
def test_both_streams_are_resumed(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MEMORY_LIMIT", limit)
    folder, windows = llama(tmp_path / "dense")
    checkpoint, options = Checkpoint.open(folder), GPTQ.Options(**OPTIONS)

    class Killed(Exception):
        pass

    def kill(text: str, share: float) -> None:
        if share > 0.5:
            raise Killed

    unbroken, resumed = (started(checkpoint, windows, tmp_path / name) for name in "ab")
    expected = GPTQ().apply(StreamedModel(checkpoint), options, unbroken)
    with pytest.raises(Killed):  # after the second layer of three
        GPTQ().apply(
            StreamedModel(checkpoint, progress=kill), options, started(checkpoint, windows, tmp_path / "b")
        )
    assert GPTQ().apply(StreamedModel(checkpoint), options, resumed) == expected
    assert resumed.draft.tensors == unbroken.draft.tensors
    for name in unbroken.draft.tensors:
        assert torch.equal(unbroken.draft.read(name), resumed.draft.read(name)), name
