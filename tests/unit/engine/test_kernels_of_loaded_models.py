"""The kernels of loaded models: which ones run, and that they compute what plain torch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.errors import BadInput
from compress.kernels.cpu.library import kernel_name, paths
from compress.kernels.layers.base import LowBitLinear
from tests.unit.engine.conftest import PACKED

TOKENS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))


def kernels(model: Any) -> set[str]:
    return {module.kernel for module in model.modules() if isinstance(module, LowBitLinear)}


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(TOKENS)[0].double().log_softmax(-1)


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("name", PACKED)
def test_every_path_computes_what_the_reference_computes(
    name: str, path: str, artefact: Callable[..., Path]
) -> None:
    folder = artefact(name)
    reference = compress.load(folder, dtype="float32", kernel="reference")
    assert kernels(reference) == {"reference"}
    expected = logprobs(reference)
    model = compress.load(folder, dtype="float32", kernel=f"cpu:{path}")
    # Blocks of NF4 in the down projections of this model lie in two rows, which native kernels cannot read.
    others = {"reference"} if name.startswith("nf4") else set()
    assert all(kernel.startswith(f"cpu:{path}") for kernel in kernels(model) - others)
    assert kernels(model) != {"reference"}
    # FP8, LLM.int8() and LLM-QAT round their inputs, and a small difference can end on the other side.
    assert divergence(expected, logprobs(model)) < (1e-3 if name in ("fp8", "llm-int8", "llm-qat") else 1e-7)


def test_inputs_of_8_bits_are_a_choice(artefact: Callable[..., Path]) -> None:
    folder = artefact("int4")
    expected = logprobs(compress.load(folder, dtype="float32"))
    rounded = compress.load(folder, dtype="float32", kernel="cpu", activation_bits=8)
    assert kernels(rounded) == {f"{kernel_name()} with int8 inputs"}
    assert 1e-9 < divergence(expected, logprobs(rounded)) < 2e-3
    with pytest.raises(BadInput, match="8 or 16 bits, not 4"):
        compress.load(folder, activation_bits=4)


def test_the_reference_is_a_choice_that_needs_no_explanation(
    artefact: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    compress.load(artefact("int4"), kernel="reference")
    assert "not fused" not in caplog.text


def test_a_kernel_that_is_not_there(artefact: Callable[..., Path]) -> None:
    with pytest.raises(
        BadInput, match="There is no kernel 'cpu:vliw'; this machine can run: auto, reference"
    ):
        compress.load(artefact("int4"), kernel="cpu:vliw")
