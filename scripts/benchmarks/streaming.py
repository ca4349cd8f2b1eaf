#!/usr/bin/env python
"""Measure the peak memory of runs on a model that is much larger than that memory.

This writes a randomly initialised Llama (bfloat16, 4.5 GB by default) shard by shard, puts it through each
recipe in a fresh process, and compares peak resident memory with the size of the weights.

    python scripts/benchmarks/streaming.py [--layers 26] [--recipes replaceme flap gptq] [--limit-mb 2500]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Sheet, lineage, parser, write_recipe

if TYPE_CHECKING:
    import torch

CALIBRATION = {"source": "bundled", "seqlen": 256}
RECIPES: dict[str, tuple[int, list[dict[str, Any]]]] = {  # name -> (calibration windows, steps)
    "replaceme": (
        8,
        [
            {"method": "replaceme", "layers": 2, "transform": "least-squares", "l2": 1.0},
            {"method": "rtn", "bits": 4, "group_size": 128},
        ],
    ),
    "flap": (8, [{"method": "flap", "ratio": 0.2, "compensate": "bias"}]),
    # Least squares on 6912 neurons needs this many windows.
    "flap-least-squares": (28, [{"method": "flap", "ratio": 0.2, "compensate": "least-squares"}]),
    # Few tokens and steps are enough: more take time, and no memory beyond that of the hidden states.
    "gptq": (2, [{"method": "gptq", "bits": 4, "group_size": 128}]),
    "awq": (2, [{"method": "awq", "bits": 4, "group_size": 128}]),
    "hqq": (2, [{"method": "hqq", "bits": 4, "group_size": 128}]),
    "apiq": (2, [{"method": "apiq", "bits": 2, "group_size": 128, "rank": 16, "steps": 4}]),
    "apiq-saliency": (
        2,
        [
            {
                "method": "apiq",
                "bits": 2,
                "group_size": 128,
                "rank": 16,
                "steps": 4,
                "saliency": "before_lora",
            }
        ],
    ),
    "nested": (2, [{"method": "nested", "bits": 4, "order_windows": 2}]),
    "bitstack": (2, [{"method": "bitstack", "blocks": 2, "order_windows": 2}]),
}


SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
}


def write_model(folder: Path, layers: int, sizes: dict[str, int] = SIZES) -> int:
    """Write a random Llama in bfloat16 with one layer in memory; returns its size in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **sizes,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    width, inner = config.hidden_size, config.intermediate_size
    few = width * config.num_key_value_heads // config.num_attention_heads
    linears = {f"self_attn.{p}_proj": (few if p in "kv" else width, width) for p in "qkvo"} | {
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    parts = [
        {
            "model.embed_tokens.weight": random(config.vocab_size, width),
            "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
            "lm_head.weight": random(config.vocab_size, width),
        }
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        if number:
            name = f"model.layers.{number - 1}"
            part = {f"{name}.{linear}.weight": random(*shape) for linear, shape in linears.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                part[f"{name}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        else:
            part = parts.pop()
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    return total


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, so that real text can be given to a random model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: 2 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def run_recipe(name: str, model: Path, folder: Path) -> tuple[int, float, dict[str, Any]]:
    """Peak resident memory (bytes), seconds and lineage of one recipe in a process of its own."""
    windows, steps = RECIPES[name]
    output = folder / name
    recipe = write_recipe(folder / f"{name}.yaml", model, steps, {**CALIBRATION, "nsamples": windows})
    command = [sys.executable, "-m", "compress", "run", str(recipe), "-o", str(output), "--overwrite"]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    # This is the usage of this child alone; in KiB on Linux and in bytes on macOS.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"The recipe {name} failed.")
    seconds = time.perf_counter() - started
    document = lineage(output)
    shutil.rmtree(output)
    # A step that begins resets the system's own count (`reset_peak_memory`), so it misses earlier steps.
    whole = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(whole, *(step["peak_memory_bytes"] for step in document["steps"])), seconds, document


class Bench:
    """The random model, written when the first recipe needs it, and the rows of a sheet."""

    def __init__(self, sheet: Sheet, layers: int) -> None:
        self.sheet, self.layers = sheet, layers
        self.folder = sheet.folder / "work"

    @cache  # noqa: B019 - there is one of it
    def model(self) -> tuple[Path, int]:
        """The model's folder and its size in bytes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.folder / "model", write_model(self.folder / "model", self.layers)

    @cache  # noqa: B019
    def run(self, name: str) -> tuple[int, float, dict[str, Any]]:
        return run_recipe(name, self.model()[0], self.folder)

    def measured(self, name: str, index: int | None) -> dict[str, Any]:
        """One step of a recipe, or with None the whole run."""
        peak, seconds, document = self.run(name)
        size = self.model()[1]
        figures: dict[str, Any] = {
            "layers": {"value": self.layers},
            "weights": {"value": size, "unit": "bytes"},
        }
        if index is None:
            figures["shrinks"] = {"value": size / document["result"]["bytes"]}
        else:
            peak, seconds = (document["steps"][index][key] for key in ("peak_memory_bytes", "seconds"))
        windows, steps = RECIPES[name]
        return {
            "steps": steps,
            "calibration": {**CALIBRATION, "nsamples": windows},
            "figures": figures,
            "seconds": seconds,
            "peak_memory_bytes": peak,
        }

    def rows(self, name: str) -> int:
        """Measure a recipe, put its rows into the sheet, and return the peak of the whole run in bytes."""
        for index, step in enumerate(RECIPES[name][1]):
            self.sheet.row(f"{name}: {step['method']}", lambda i=index: self.measured(name, i))
        whole = self.sheet.row(f"{name}: whole run", lambda: self.measured(name, None))
        return whole.peak_memory_bytes or 0


def main() -> None:
    options = parser(__doc__, "streaming")
    options.add_argument("--layers", type=int, default=26, help="26 layers are 4.5 GB")
    options.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    options.add_argument(
        "--limit-mb", type=float, help="exit with 1 if the peak is above this many MB (10^6 bytes)"
    )
    arguments = options.parse_args()
    arguments.folder /= f"{arguments.layers}-layers"
    sheet = Sheet(arguments, "streaming")
    bench = Bench(sheet, arguments.layers)
    peak = max(bench.rows(name) for name in arguments.recipes)
    sheet.show()
    shutil.rmtree(bench.folder, ignore_errors=True)
    if arguments.limit_mb and peak / 1e6 > arguments.limit_mb:
        sys.exit(f"The peak is above {arguments.limit_mb:,.0f} MB.")


if __name__ == "__main__":
    main()
