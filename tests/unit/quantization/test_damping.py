"""What is added to the Hessian's diagonal where a recipe does not say: more where there is little text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.storage.checkpoint import Checkpoint

NSAMPLES, SEQLEN = 4, 64
LINEARS = {  # input dimension -> linears of the first layer, whose inputs nothing has changed yet
    64: ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"),
    96: ("mlp.down_proj",),
}


def packed(model: Path, output: Path, method: str, names: list[str], **options: object) -> list[torch.Tensor]:
    text = {"source": str(model.parent / "text.txt"), "nsamples": NSAMPLES, "seqlen": SEQLEN}
    step = {"method": method, "bits": 2, "group_size": 16, **options}
    compress.run({"model": str(model), "calibration": text, "steps": [step]}, output)
    made = Checkpoint.open(output)
    return [made.read(tensor) for tensor in sorted(made.tensors) if tensor.startswith(tuple(names))]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    assert one
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["gptq", "nested"])
def test_it_is_the_inputs_of_the_linear_for_each_token(
    method: str, tmp_path: Path, shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder("LlamaForCausalLM")
    for width, linears in LINEARS.items():
        names = [f"model.layers.0.{path}." for path in linears]
        usual, ours, least = (
            packed(model, tmp_path / f"{width}-{damping}", method, names, damping=damping)
            for damping in (None, width / (NSAMPLES * SEQLEN), 0.01)
        )
        assert same(usual, ours)
        assert not same(usual, least)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_head_is_rounded_with_it_too(
    method: str, tmp_path: Path, shared_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.quantization.parts import head

    given, original = [], head.round_by_columns
    monkeypatch.setattr(
        head, "round_by_columns", lambda *args, **how: given.append(how["damping"]) or original(*args, **how)
    )
    model = shared_decoder("LlamaForCausalLM", tie_word_embeddings=False)
    packed(model, tmp_path / "result", method, ["lm_head"], lm_head_bits=4)
    assert given == [64 / (NSAMPLES * SEQLEN)]
