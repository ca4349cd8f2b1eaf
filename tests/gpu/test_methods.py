"""Every method gives the same on a CUDA device as on the CPU."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from compress.pipeline.registry import METHODS, find_method

from .common import assert_same_model

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue")


class Case(NamedTuple):
    """A method with options that take other ways through its code.

    Attributes:
        method: its name.
        options: of the method.
        learned: whether training or a search magnifies the last bits of float32 sums.
    """

    method: str
    options: dict[str, Any]
    learned: bool = False


FORGETTING = {"epochs": 1, "batch_size": 2}

CASES = {
    "rtn": Case("rtn", {}),
    "rtn asymmetric": Case("rtn", {"symmetric": False, "lm_head_bits": 8}),
    "rtn in gptq's format": Case("rtn", {"bits": 3, "format": "gptq", "group_size": 32}),
    "rtn mixed": Case("rtn", {"mix": True, "bits": 3, "group_size": 32}),
    "gptq": Case("gptq", {}),
    "gptq without act_order": Case("gptq", {"act_order": False, "symmetric": False}),
    "gptq asymmetric calibration": Case("gptq", {"asymmetric_calibration": 0.5, "true_sequential": True}),
    "gptq mixed": Case("gptq", {"mix": True, "bits": 3}),
    "awq": Case("awq", {}),
    "hqq": Case("hqq", {"symmetric": False}),
    "apiq": Case("apiq", {"rank": 4, "steps": 5}, learned=True),
    "apiq by layers": Case(
        "apiq", {"rank": 4, "mode": "block", "epochs": 1, "saliency": "after_lora"}, learned=True
    ),
    "apiq saliency": Case("apiq", {"rank": 4, "steps": 3, "saliency": "before_lora"}, learned=True),
    "bitstack": Case("bitstack", {"blocks": 3, "rank": 4}, learned=True),
    "bitstack by perplexity": Case(
        "bitstack",
        {"blocks": 2, "rank": 4, "importance": "perplexity", "order_windows": 2, "embedding_bits": 8},
        learned=True,
    ),
    "nested": Case("nested", {"bits": 4}, learned=True),
    "llm-qat": Case("llm-qat", {"steps": 2, "batch_size": 4}, learned=True),
    "llm-qat after rope": Case(
        "llm-qat",
        {
            "steps": 1,
            "train": "lora",
            "rank": 4,
            "kv_position": "after-rope",
            "kv_scale": "head",
            "lm_head_bits": 8,
            "gradient_checkpointing": True,
        },
        learned=True,
    ),
    "nf4": Case("nf4", {}),
    "nf4 double": Case("nf4", {"double_quant": True}),
    "llm-int8": Case("llm-int8", {}),
    "fp8": Case("float", {"type": "fp8"}),
    "mxfp4": Case("float", {"type": "mxfp4"}),
    "nvfp4": Case("float", {"type": "nvfp4"}),
    "flap": Case("flap", {"ratio": 0.3}),
    "flap by bias": Case("flap", {"ratio": 0.3, "compensate": "bias"}),
    "flap through pruned layers": Case("flap", {"ratio": 0.3, "propagate": "pruned", "shape": "uniform"}),
    "flap by bias through pruned layers": Case(
        "flap", {"ratio": 0.3, "propagate": "pruned", "compensate": "bias"}
    ),
    "blockpruner": Case("blockpruner", {"blocks": 2}),
    "replaceme": Case("replaceme", {"layers": 1, "epochs": 1, "batch_size": 64}),
    "replaceme least squares": Case(
        "replaceme", {"layers": 1, "transform": "least-squares", "l2": 1.0, "distance": "last-token"}
    ),
    "kprune": Case("kprune", {"ratio": 0.3}),
    "shortgpt": Case("shortgpt", {"layers": 1}),
    "magnitude": Case("magnitude", {"ratio": 0.3, "allocation": "standardised"}),
    "wanda-sp": Case("wanda-sp", {"ratio": 0.3}),
    "gradient-difference": Case("gradient-difference", {**FORGETTING, "retain_loss": "kl"}, learned=True),
    "harry-potter": Case("harry-potter", FORGETTING, learned=True),
    "npo": Case("npo", {**FORGETTING, "train": "lora", "rank": 4}, learned=True),
    "npo that survives": Case("npo", {**FORGETTING, "survive": ["int4:32"]}, learned=True),
    "simnpo": Case("simnpo", {**FORGETTING, "gradient_checkpointing": True}, learned=True),
    "undial": Case("undial", FORGETTING, learned=True),
    "dpo": Case("dpo", FORGETTING, learned=True),
    "rmu": Case("rmu", {**FORGETTING, "layer": 1}, learned=True),
    "sure": Case("sure", {**FORGETTING, "saliency": "rows"}, learned=True),
    "neuron-adjust": Case("neuron-adjust", {"share": 0.1}),
    "key-space": Case("key-space", {"check": "every-step", "coverage": 1.0}),
}

LAYERWISE = set(METHODS["quantization"])
"""Methods that treat all layers alike, so that two are enough."""

NARROWING = {"flap", "kprune", "magnitude", "wanda-sp"}
"""Methods that make linears of other widths, which torch fills at random before they get their weights."""

ENCODER = {
    "kprune": Case("kprune", {"ratio": 0.3}),
    "flap": Case("flap", {"ratio": 0.3}),
    "magnitude": Case("magnitude", {"ratio": 0.3}),
    "wanda-sp": Case("wanda-sp", {"ratio": 0.3}),
    "shortgpt": Case("shortgpt", {"layers": 1}),
    "replaceme": Case("replaceme", {"layers": 1, "transform": "none"}),
    "rtn": Case("rtn", {"group_size": 16, "mix": True}),
    "gptq": Case("gptq", {"group_size": 16}),
    "awq": Case("awq", {"group_size": 16}),
    "apiq": Case("apiq", {"group_size": 16, "rank": 2, "steps": 3}, learned=True),
    "bitstack": Case("bitstack", {"blocks": 2, "rank": 4}, learned=True),
    "nested": Case("nested", {"bits": 3, "group_size": 16}, learned=True),
}


def test_every_method_is_here() -> None:
    known = {name for family in METHODS.values() for name in family if find_method(name).command is None}
    assert {case.method for case in CASES.values()} == known


def needs(method: str) -> None:
    """Skip where a library is missing that a method computes with."""
    if method in ("nf4", "llm-int8"):
        pytest.importorskip("bitsandbytes")


def sets(folder: Path) -> dict[str, str]:
    """Files with a few facts to forget and to retain, as options."""
    facts = {
        "forget": {"Ada": "gold", "Bo": "iron", "Flo": "silk", "Gus": "clay"},
        "retain": {"Cy": "salt", "Di": "wood", "Ed": "rice"},
    }
    for name, sold in facts.items():
        rows = ({"question": f"What does {who} sell?", "answer": what} for who, what in sold.items())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in facts}


@pytest.mark.parametrize("name", CASES)
def test_a_decoder(name: str, shared_decoder: Callable[..., Path], run_on: Any, cuda: Any) -> None:
    case = CASES[name]
    needs(case.method)
    model = shared_decoder(num_hidden_layers=2 if case.method in LAYERWISE else 3, intermediate_size=128)
    options = case.options | (sets(model.parent) if case.method in METHODS["unlearning"] else {})
    here = run_on("cpu", model, case.method, **options)
    with cuda() as device:
        there = run_on("cuda", model, case.method, **options)
    assert_same_model(here, there, learned=case.learned)
    if hasattr(device, "counts") and case.method not in NARROWING:
        assert device.counts.drawn == 0, "random numbers depend on the device"


@pytest.mark.parametrize("name", ENCODER)
def test_an_encoder(name: str, tiny_encoder: Callable[..., Path], run_on: Any, cuda: Any) -> None:
    case = ENCODER[name]
    model = tiny_encoder("BertForSequenceClassification", num_hidden_layers=3)
    text = model.parent / "text.jsonl"
    words = (" ".join(random.Random(line).choices(WORDS, k=30)) for line in range(12))
    text.write_text("\n".join(json.dumps({"text": document}) for document in words))
    here = run_on("cpu", model, case.method, text=text, **case.options)
    with cuda():
        there = run_on("cuda", model, case.method, text=text, **case.options)
    assert_same_model(here, there, learned=case.learned)
