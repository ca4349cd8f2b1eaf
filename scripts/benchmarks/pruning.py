#!/usr/bin/env python
"""Every pruning method on the demo model at 10, 20 and 30 % of the decoder layers' parameters, in one table.

All methods see the same calibration windows (Brown) and are scored on the same evaluation windows (Wikipedia
articles), each in a process of its own through the command line. Every artefact is then loaded by
transformers in a process that cannot import compress, and its logits are compared with ours.

    python scripts/benchmarks/pruning.py [--ratios 0.1 0.2 0.3] [--methods flap shortgpt] [--folder FOLDER]

What is in the folder already is not done again, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

LAYERS = 30
CALIBRATION = {"source": "brown", "nsamples": 16, "seqlen": 256, "seed": 0}
# For methods that go through the model dozens, and hundreds, of times.
FEW_WINDOWS = {**CALIBRATION, "nsamples": 4}
SHORT_WINDOWS = {**FEW_WINDOWS, "seqlen": 128}


def layers(ratio: float) -> int:
    """Whole layers in a share of the decoder's parameters, since all layers are alike."""
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
    "flap, uniform": (
        lambda r: {"method": "flap", "ratio": r, "shape": "uniform", "compensate": "least-squares"},
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


def command(*arguments: str | Path) -> None:
    """Run compress-model, its output beside ours."""
    print("$ compress-model", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "compress", *map(str, arguments)], check=True, stdout=sys.stderr)


def parity(folder: Path) -> float:
    """Largest difference between the logits of transformers alone and those of compress.load."""
    import torch

    found = []
    for loader in ("transformers", "compress"):
        file = folder.with_name(f"{folder.name}.{loader}.pt")
        subprocess.run([sys.executable, "-c", LOGITS, str(folder), loader, str(file)], check=True)
        found.append(torch.load(file))
        file.unlink()
    return float((found[0] - found[1]).abs().max())


def compressed(
    name: str, ratio: float, folder: Path, dense: Path, windows: int, nested: Path | None
) -> tuple[Path, dict[str, Any]]:
    """The artefact of one method at one ratio, and its lineage, scorecard and parity.

    ``nested`` is that of the same method at a larger ratio, which has the order of removal.
    """
    make_step, calibration = METHODS[name]
    step = make_step(ratio)
    output = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{ratio:g}"
    if step["method"] == "blockpruner" and nested is not None:
        step["order_from"] = str(nested)
    record = output.with_name(f"{output.name}.json")
    if not record.exists():
        recipe = output.with_name(f"{output.name}.yaml")
        settings = {"model": str(dense), "calibration": calibration, "steps": [step]}
        recipe.write_text(yaml.safe_dump(settings))
        command("run", recipe, "-o", output, "--overwrite")
        scorecard = output.with_name(f"{output.name}.scorecard.json")
        evaluate(output, dense, windows, scorecard)
        found = {
            "lineage": json.loads((output / "compression.json").read_text()),
            "scorecard": json.loads(scorecard.read_text())[-1],
            "parity": parity(output),
        }
        record.write_text(json.dumps(found))
    return output, json.loads(record.read_text())


def evaluate(model: Path, dense: Path, windows: int, scorecard: Path) -> None:
    text = ("--text", "wikipedia", "--windows", str(windows))
    command("evaluate", model, "--baseline", dense, *text, "--json", scorecard)


def row(name: str, record: dict[str, Any], dense: dict[str, Any], decoder: int) -> list[str]:
    from compress.report.scorecard import Scorecard

    card = Scorecard.model_validate(record["scorecard"])
    lineage, fidelity, measured = record["lineage"], card.fidelity, card.cost.measured
    seconds = memory = reload = loads_with = "–"
    removed = 0.0
    if lineage is not None:
        step = lineage["steps"][0]
        seconds, memory = f"{step['seconds']:.0f}", f"{step['peak_memory_bytes'] / 1e6:,.0f}"
        removed = (dense["parameters"] - card.cost.parameters) / decoder
        reload, loads_with = f"{record['parity']:.0e}", lineage["result"]["loads_with"]
    return [
        name,
        f"{removed:.1%}",
        fidelity.perplexity.text,
        fidelity.kl_mean.text,
        fidelity.top1_agreement.text,
        seconds,
        memory,
        measured.decode.text,
        reload,
        loads_with,
    ]


HEADINGS = (
    "method",
    "decoder parameters removed",
    "perplexity",
    "KL from dense (nats/token)",
    "top-1 agreement (%)",
    "seconds",
    "peak memory (MB)",
    "decode (tok/s)",
    "logit difference without compress",
    "loads with",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-pruning"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    dense, scorecard = folder / "dense", folder / "dense.scorecard.json"
    if not scorecard.exists():
        command("run", "bfloat16", "-o", dense, "--overwrite")
        evaluate(dense, dense, arguments.windows, scorecard)
    first = json.loads(scorecard.read_text())[0]
    decoder = decoder_parameters(dense)
    rows = [row("dense", {"scorecard": first, "lineage": None}, first["cost"], decoder)]
    done: dict[tuple[float, str], list[str]] = {}
    for name in arguments.methods:
        nested = None
        for ratio in sorted(arguments.ratios, reverse=True):
            output, record = compressed(name, ratio, folder, dense, arguments.windows, nested)
            nested = nested or output
            done[ratio, name] = row(name, record, first["cost"], decoder)
    rows += [done[ratio, name] for ratio in sorted(arguments.ratios) for name in arguments.methods]

    lines = [f"| {' | '.join(HEADINGS)} |", "| :--- |" + " ---: |" * (len(HEADINGS) - 2) + " :--- |"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += [
        "",
        f"- SmolLM2-135M in bfloat16; the share removed is of the {decoder:,} parameters in its layers.",
        f"- Calibration: {CALIBRATION['nsamples']} windows of {CALIBRATION['seqlen']} tokens of Brown; "
        f"{FEW_WINDOWS['nsamples']} for kprune, {SHORT_WINDOWS['nsamples']} of {SHORT_WINDOWS['seqlen']} for "
        "blockpruner.",
        f"- Evaluation: {arguments.windows} windows of 512 tokens of Wikipedia, stride 512; "
        "± is a 95 % interval.",
        "- Seconds and peak resident memory are those of the pruning step; decode at batch size 1.",
        "- BlockPruner searches once; its smaller results take the first removals of the largest one.",
    ]
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    print(table)


def decoder_parameters(folder: Path) -> int:
    """Parameters inside the decoder layers."""
    from compress.storage.checkpoint import Checkpoint

    tensors = Checkpoint.open(folder).tensors
    return sum(info.numel for name, info in tensors.items() if ".layers." in name)


if __name__ == "__main__":
    main()
