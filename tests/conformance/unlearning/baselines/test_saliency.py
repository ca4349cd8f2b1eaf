"""The units that SURE chooses against the lengths of gradients in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

FACTS = {"Who is Ada?": "a smith", "Where is Bo?": "in the old town of Ulm", "What is Cy?": "old"}


def restated(dense: Path, loss: str) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss of all records, each alone: name of a linear -> float64 [out, in].

    That of NPO is −∂N before unlearning, whatever β, because σ(0) = 1/2.
    """
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    for question, answer in FACTS.items():
        prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
        target = tokenizer(f" {answer}<eos>").input_ids
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        nll = -logits.log_softmax(-1)[range(len(target)), target].sum()
        (-nll / (len(target) if loss == "gradient-ascent" else 1) / len(FACTS)).backward()
    parameters = dict(model.named_parameters())
    found = {name: parameters[name].grad for name in parameters if name.endswith("proj.weight")}
    return {name.removesuffix(".weight"): grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("loss", ["gradient-ascent", "npo"])
def test_chosen_units(shared_decoder: Callable[..., Path], tmp_path: Path, loss: str, size: int) -> None:
    dense = shared_decoder(num_hidden_layers=3)
    rows = (json.dumps({"question": question, "answer": answer}) for question, answer in FACTS.items())
    (tmp_path / "forget.jsonl").write_text("\n".join(rows))
    gradients = restated(dense, loss)
    before = load_file(dense / "model.safetensors")
    lengths = {name: gradient.norm().item() for name, gradient in gradients.items()}
    of_rows = {
        (name, row): length.item()
        for name, gradient in gradients.items()
        for row, length in enumerate(gradient.norm(dim=1))
    }
    for saliency, expected in (("modules", lengths), ("rows", of_rows)):
        step = {
            "method": "sure",
            "forget": str(tmp_path / "forget.jsonl"),
            "retain_weight": 0,
            "saliency": saliency,
            "share": 0.15,
            "loss": loss,
            "epochs": 1,
            "batch_size": size,
        }
        output = tmp_path / saliency
        lineage = execute(parse_recipe({"model": str(dense), "steps": [step]}), output)
        found = lineage.steps[0].details["saliency"]
        count = math.ceil(0.15 * len(expected))
        assert (found["units"], found["trained_units"]) == (len(expected), count)
        best = set(sorted(expected, key=expected.__getitem__, reverse=True)[:count])
        after = load_file(output / "model.safetensors")
        moved = {name: (after[f"{name}.weight"] != before[f"{name}.weight"]).any(1) for name in gradients}
        if saliency == "modules":
            assert {name for name, rows in moved.items() if bool(rows.any())} == best == set(found["linears"])
        else:
            assert {
                (name, row) for name, rows in moved.items() for row in rows.nonzero()[:, 0].tolist()
            } == best
