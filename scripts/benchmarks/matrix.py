#!/usr/bin/env python
"""Try every pruner with every quantizer on every architecture, and every method on odd model folders.

Everything is done with defaults, on tiny random models, in one process. An outcome is one of:

- done: the result was written, and loads, computes and generates what it did in memory;
- refused: the plan says in a sentence why not, before any work;
- anything else is a fault: refused only after work was done, an internal error, or a wrong result.

    OMP_NUM_THREADS=1 python scripts/benchmarks/matrix.py [--pruners flap ...] [--quantizers gptq ...]

An interrupted run goes on: rows that are in --folder already are not tried again.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from common import Sheet, parser
from tiny_models import ARCHITECTURES, ODDITIES, odd_model, write_model, write_text

import compress
from compress.errors import BadInput, CompressError
from compress.pipeline.plan import make_plan, open_model
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

DONE, REFUSED = "done", "refused"
PRUNERS: dict[str, dict[str, Any]] = {
    "none": {},
    "flap": {"ratio": 0.3},
    "kprune": {"ratio": 0.3},
    "magnitude": {"ratio": 0.3},
    "wanda-sp": {"ratio": 0.3},
    "blockpruner": {"ratio": 0.2},
    "replaceme": {"layers": 1},
    "shortgpt": {"layers": 1},
}
"""Name -> the options that have no default."""
QUANTIZERS = ["none", "rtn", "hqq", "awq", "gptq", "apiq", "llm-qat", "float", "nf4", "llm-int8"]
QUANTIZERS += ["bitstack", "nested"]
STEPS = {name: {"method": name, **options} for name, options in PRUNERS.items()}
STEPS |= {name: {"method": name} for name in QUANTIZERS}
STEPS["apiq"]["steps"] = 3  # of training, which is not what is tried here
EXACT = ("transformers", "transformers with compressed-tensors")
"""What must compute the same here (inputs of 8 bits excepted); other libraries have conformance tests."""
TOLERANCE = 2e-3
"""Largest difference of logits, as a share of the largest logit, between two loaders."""


def steps_of(pruner: str, quantizer: str) -> list[dict[str, Any]]:
    """The steps of a cell."""
    return [STEPS[name] for name in (pruner, quantizer) if name != "none"]


def outcome(model: Path, steps: list[dict[str, Any]], text: Path, output: Path) -> str:
    """Try one cell: "done", "refused: ...", or what is wrong."""
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "model": str(model),
        "calibration": {"source": str(text), "nsamples": 8, "seqlen": 32},
        "steps": steps,
    }
    try:
        parsed = parse_recipe(recipe)
        make_plan(open_model(parsed)[1], parsed.steps)
    except BadInput as error:
        return f"{REFUSED}: {error}"
    except Exception as error:
        return f"internal error in the plan: {_shown(error)}"
    try:
        lineage = execute(parsed, output, resume=False)
    except CompressError as error:
        return f"refused after the plan: {error}"
    except Exception as error:
        return f"internal error: {_shown(error)}"
    try:
        return next(faults(output, lineage.result.loads_with), DONE)
    except Exception as error:
        return f"wrong: the result cannot be used: {_shown(error)}"


@torch.no_grad()
def faults(folder: Path, loads_with: str) -> Iterator[str]:
    """Yield what is wrong with a result."""
    ours = compress.load(folder)
    tokens = torch.arange(10, 34).view(2, 12)
    wanted = _first(ours(tokens))
    if not wanted.isfinite().all():
        yield "wrong: not finite"
    quantized = str(json.loads((folder / "config.json").read_text()).get("quantization_config"))
    if "'dynamic': True" not in quantized and loads_with.removesuffix(" (trust_remote_code=True)") in EXACT:
        theirs = _first(type_of(folder).from_pretrained(folder, trust_remote_code=True)(tokens))
        if (theirs - wanted).abs().max() > TOLERANCE * wanted.abs().max():
            yield "wrong: transformers computes something else"
    generates = getattr(ours, "can_generate", lambda: False)() and "logits" in ours(tokens)
    if generates and not torch.equal(_generated(ours, tokens, True), _generated(ours, tokens, False)):
        yield "wrong: it generates something else with a cache"


def _generated(model: Any, tokens: torch.Tensor, cached: bool) -> torch.Tensor:
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "eos_token_id": None}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)


def type_of(folder: Path) -> Any:
    """The class of transformers that loads a folder."""
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    autos = [name for name in getattr(config, "auto_map", {}) if name != "AutoConfig"]
    return getattr(hf, autos[0] if autos else (config.architectures or ["AutoModelForCausalLM"])[0])


def _first(output: Any) -> torch.Tensor:
    return (output["logits"] if "logits" in output else output[0]).float()


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measured(outcomes: dict[str, str], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a row, whose cells had these outcomes."""
    done = sum(each == DONE for each in outcomes.values())
    refused = sum(each.startswith(f"{REFUSED}: ") for each in outcomes.values())
    counts = {"done": done, "refused": refused, "faults": len(outcomes) - done - refused}
    return {
        "steps": steps,
        "figures": {name: {"value": count} for name, count in counts.items()},
        "facts": {name: each for name, each in outcomes.items() if each != DONE},
    }


def main() -> int:
    arguments_of = parser(__doc__, "matrix")
    arguments_of.add_argument("--pruners", nargs="*", choices=PRUNERS, default=list(PRUNERS))
    arguments_of.add_argument("--quantizers", nargs="*", choices=QUANTIZERS, default=list(QUANTIZERS))
    arguments = arguments_of.parse_args()
    logging.disable(logging.INFO)
    hf.utils.logging.disable_progress_bar()
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sheet = Sheet(arguments, "matrix")
    room = sheet.folder / "models"
    text = write_text(sheet.folder / "text.jsonl")
    dense = {name: _made(room / str(number), name) for number, name in enumerate(ARCHITECTURES)}
    output = sheet.folder / "result"

    def row(
        name: str, cells: dict[str, tuple[Path, list[dict[str, Any]]]], steps: list[dict[str, Any]]
    ) -> None:
        def measure() -> dict[str, Any]:
            return measured({key: outcome(*cell, text, output) for key, cell in cells.items()}, steps)

        found = sheet.row(name, measure)
        print(name, {key: int(figure.value) for key, figure in found.figures.items()}, flush=True)
        for key, what in found.facts.items():
            if not what.startswith(REFUSED):
                print("   ", key, what, file=sys.stderr, flush=True)

    for pruner in arguments.pruners:
        for quantizer in arguments.quantizers:
            if steps := steps_of(pruner, quantizer):
                cells = {key: (model, steps) for key, model in dense.items()}
                row(" → ".join(step["method"] for step in steps), cells, steps)
    for number, (name, change) in enumerate(ODDITIES.items()):
        odd = room / f"odd-{number}"
        shutil.rmtree(odd, ignore_errors=True)
        odd_model(odd, dense["llama"], change)
        row(name, {key: (odd, [step]) for key, step in STEPS.items() if key != "none"}, [])
    sheet.show()
    return int(any(record.figures["faults"].value for record in sheet.rows))


def _made(folder: Path, name: str) -> Path:
    return folder if (folder / "config.json").exists() else write_model(folder, name)


if __name__ == "__main__":
    raise SystemExit(main())
