#!/usr/bin/env python
"""Peak memory of a run on a model much larger than that: the streaming engine's promise, measured.

Writes a randomly initialised Llama (bfloat16, 4.5 GB by default) shard by shard, puts it through each recipe
in a fresh process, and prints peak resident memory against the size of the weights.

    python scripts/benchmarks/streaming.py [--layers 26] [--recipes replaceme flap gptq] [--limit-mb 2500]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

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
    # As many windows as least squares needs on 6912 neurons.
    "flap-least-squares": (28, [{"method": "flap", "ratio": 0.2, "compensate": "least-squares"}]),
    # Few tokens and steps: they take time, and no memory beyond that of the hidden states.
    "gptq": (2, [{"method": "gptq", "bits": 4, "group_size": 128}]),
    "awq": (2, [{"method": "awq", "bits": 4, "group_size": 128}]),
    "hqq": (2, [{"method": "hqq", "bits": 4, "group_size": 128}]),
    "apiq": (2, [{"method": "apiq", "bits": 2, "group_size": 128, "rank": 16, "steps": 4}]),
    "nested": (2, [{"method": "nested", "bits": 4, "order_windows": 2}]),
    "bitstack": (2, [{"method": "bitstack", "blocks": 2, "order_windows": 2}]),
}


def write_model(folder: Path, layers: int) -> int:
    """Write the random model, one layer in memory at a time; its size in bytes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=20,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    width, inner = config.hidden_size, config.intermediate_size
    linears = dict.fromkeys((f"self_attn.{p}_proj" for p in "qkvo"), (width, width)) | {
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
    """A tokenizer of bytes, so that real text can be given to a random model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: 2 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=26, help="26 layers are 4.5 GB")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("out/bench-streaming"))
    parser.add_argument(
        "--limit-mb", type=float, help="exit with 1 if the peak is above this many MB (10^6 bytes)"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    model = arguments.folder / "model"
    size = write_model(model, arguments.layers)
    print(f"random Llama: {arguments.layers} layers, {size / 1e6:,.0f} MB of bfloat16 weights", flush=True)

    print(f"{'recipe':<20}{'step':<12}{'peak resident MB':>18}{'seconds':>10}")
    peaks = []
    for name in arguments.recipes:
        peak, seconds, lineage = run_recipe(name, model, arguments.folder)
        peaks.append(peak)
        for step in lineage["steps"]:
            figures = f"{step['peak_memory_bytes'] / 1e6:>18,.0f}{step['seconds']:>10,.0f}"
            print(f"{name:<20}{step['method']:<12}{figures}")
        print(f"{name:<20}{'whole run':<12}{peak / 1e6:>18,.0f}{seconds:>10,.0f}", flush=True)
        print(f"weights before / after {name} = {size / lineage['result']['bytes']:.2f}")
    print(f"peak resident memory / bytes of weights = {max(peaks) / size:.2f}")
    shutil.rmtree(arguments.folder)
    if arguments.limit_mb and max(peaks) / 1e6 > arguments.limit_mb:
        sys.exit(f"The peak is above {arguments.limit_mb:,.0f} MB.")


def run_recipe(name: str, model: Path, folder: Path) -> tuple[int, float, dict[str, Any]]:
    """Peak resident memory (bytes), seconds and lineage of one recipe in a process of its own."""
    windows, steps = RECIPES[name]
    recipe, output = folder / f"{name}.yaml", folder / name
    document = {"model": str(model), "calibration": {**CALIBRATION, "nsamples": windows}, "steps": steps}
    recipe.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "compress", "run", str(recipe), "-o", str(output)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    # Of this child alone; in KiB on Linux and in bytes on macOS.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"The recipe {name} failed.")
    seconds = time.perf_counter() - started
    lineage = json.loads((output / "compression.json").read_text())
    shutil.rmtree(output)
    # A step that begins sets the system's own count back (`reset_peak_memory`), so that misses earlier steps.
    whole = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(whole, *(step["peak_memory_bytes"] for step in lineage["steps"])), seconds, lineage


if __name__ == "__main__":
    main()
