#!/usr/bin/env python
"""Compare every pruning method on the demo model, at 10, 20 and 30 % of the parameters of its layers.

All methods see the same calibration windows (Brown) and are scored on the same evaluation windows (Wikipedia
articles), each in a process of its own through the command line. Every result is then loaded by transformers
in a process that cannot import compress, and its logits are compared with ours.

    python scripts/benchmarks/pruning.py [--ratios 0.1 0.2 0.3] [--methods flap shortgpt]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Sheet, compressed, dense_model, evaluated, parser, slug

LAYERS = 30
CALIBRATION = {"source": "brown", "nsamples": 16, "seqlen": 256, "seed": 0}
# For methods that go through the model dozens or hundreds of times.
FEW_WINDOWS = {**CALIBRATION, "nsamples": 4}
SHORT_WINDOWS = {**FEW_WINDOWS, "seqlen": 128}


def layers(ratio: float) -> int:
    """How many whole layers make up a share of the parameters; all layers are alike."""
    return round(ratio * LAYERS)


# name -> (the step at a ratio, calibration)
METHODS: dict[str, tuple[Callable[[float], dict[str, Any]], dict[str, Any]]] = {
    "magnitude": (lambda r: {"method": "magnitude", "ratio": r}, CALIBRATION),
    "wanda-sp": (lambda r: {"method": "wanda-sp", "ratio": r}, CALIBRATION),
    "flap, bias": (lambda r: {"method": "flap", "ratio": r, "compensate": "bias"}, CALIBRATION),
    "flap, least squares": (
        lambda r: {"method": "flap", "ratio": r, "compensate": "least-squares"},
        CALIBRATION,
    ),
    "flap, uniform": (lambda r: {"method": "flap", "ratio": r, "shape": "uniform"}, CALIBRATION),
    "flap, uniform, widths only": (
        lambda r: {"method": "flap", "ratio": r, "shape": "uniform", "structure": "UL-MM"},
        CALIBRATION,
    ),
    "kprune": (lambda r: {"method": "kprune", "ratio": r}, FEW_WINDOWS),
    "shortgpt": (lambda r: {"method": "shortgpt", "layers": layers(r)}, CALIBRATION),
    "replaceme": (lambda r: {"method": "replaceme", "layers": layers(r)}, CALIBRATION),
    "blockpruner": (lambda r: {"method": "blockpruner", "ratio": r}, SHORT_WINDOWS),
    "blockpruner, per parameter": (
        lambda r: {"method": "blockpruner", "ratio": r, "cost": "parameters"},
        SHORT_WINDOWS,
    ),
}

LOGITS = """
import json, sys, torch
if sys.argv[2] == "transformers":
    sys.modules["compress"] = None  # an import of it fails
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
else:
    import compress
    model = compress.load(sys.argv[1], dtype="float32")
tokens = torch.randint(0, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    torch.save(model(tokens).logits, sys.argv[3])
"""


def logit_difference(folder: Path) -> float:
    """The largest difference between the logits of transformers alone and those of compress.load."""
    import torch

    found = []
    for loader in ("transformers", "compress"):
        file = folder.with_name(f"{folder.name}.{loader}.pt")
        subprocess.run([sys.executable, "-c", LOGITS, str(folder), loader, str(file)], check=True)
        found.append(torch.load(file))
        file.unlink()
    return float((found[0] - found[1]).abs().max())


def layer_parameters(folder: Path) -> int:
    """The number of parameters inside the layers."""
    from compress.storage.checkpoint import Checkpoint

    tensors = Checkpoint.open(folder).tensors
    return sum(info.numel for name, info in tensors.items() if ".layers." in name)


class Bench:
    """The dense model, its score, and the sheet of rows."""

    def __init__(self, sheet: Sheet, windows: int) -> None:
        self.sheet = sheet
        self.text = ("--text", "wikipedia", "--windows", str(windows))
        self.dense = dense_model(sheet.folder)
        self.dense_card = evaluated(self.dense, self.dense, *self.text)[0]
        self.decoder = layer_parameters(self.dense)

    def dense_row(self) -> dict[str, Any]:
        return {"figures": self.figures(self.dense_card)}

    def figures(self, card: dict[str, Any]) -> dict[str, Any]:
        """The figures of a scorecard that the table shows."""
        fidelity, cost = card["fidelity"], card["cost"]
        gone = self.dense_card["cost"]["parameters"] - cost["parameters"]
        return {
            "removed": {"value": gone / self.decoder, "unit": "fraction"},
            "perplexity": fidelity["perplexity"],
            "kl": fidelity["kl_mean"],
            "agreement": fidelity["top1_agreement"],
            "decode": cost["measured"]["decode"],
        }

    def output(self, name: str, ratio: float) -> Path:
        return self.sheet.folder / f"{slug(name)}-{ratio:g}"

    def measured(self, name: str, ratio: float, larger: Path | None) -> dict[str, Any]:
        """One method at one ratio. ``larger`` is its result at a larger ratio, with the order of removal."""
        make_step, calibration = METHODS[name]
        step, output = make_step(ratio), self.output(name, ratio)
        if step["method"] == "blockpruner" and larger is not None:
            step["order_from"] = str(larger)
        found = compressed(output, self.dense, [step], calibration)
        card = evaluated(output, self.dense, *self.text)[-1]
        done = found["steps"][0]
        step.pop("order_from", None)  # a path of this machine
        return {
            "steps": [step],
            "calibration": calibration,
            "figures": {**self.figures(card), "logit_difference": {"value": logit_difference(output)}},
            "facts": {"loads_with": str(found["result"]["loads_with"])},
            "seconds": done["seconds"],
            "peak_memory_bytes": done["peak_memory_bytes"],
        }


def main() -> None:
    options = parser(__doc__, "pruning")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="shares to remove")
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "pruning")
    bench = Bench(sheet, arguments.windows)

    sheet.row("dense", bench.dense_row)
    for name in arguments.methods:
        larger = None
        for ratio in sorted(arguments.ratios, reverse=True):
            sheet.row(f"{name}, {ratio * 100:g} %", lambda n=name, r=ratio, o=larger: bench.measured(n, r, o))
            larger = larger or bench.output(name, ratio)
    sheet.show()


if __name__ == "__main__":
    main()
