#!/usr/bin/env python
"""Peak memory of a run on a model much larger than that: the streaming engine's promise, measured.

Writes a randomly initialised Llama (bfloat16, 4.5 GB by default) shard by shard, puts it through ReplaceMe
and round-to-nearest in a fresh process, and prints peak resident memory against the size of the weights.

    python scripts/bench_streaming.py [--layers 26] [--folder out/bench-streaming] [--limit-mb 2500]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

RECIPE = """
model: MODEL
calibration: {source: bundled, nsamples: 8, seqlen: 256}
steps:
  - {method: replaceme, layers: 2, transform: least-squares, l2: 1.0}
  - {method: rtn, bits: 4, group_size: 128}
"""


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
    parser.add_argument("--folder", type=Path, default=Path("out/bench-streaming"))
    parser.add_argument(
        "--limit-mb", type=float, help="exit with 1 if the peak is above this many MB (10^6 bytes)"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    model = arguments.folder / "model"
    size = write_model(model, arguments.layers)
    recipe = arguments.folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(model)))
    print(f"random Llama: {arguments.layers} layers, {size / 1e6:,.0f} MB of bfloat16 weights", flush=True)

    started = time.perf_counter()
    output = arguments.folder / "compressed"
    command = [sys.executable, "-m", "compress", "run", str(recipe), "-o", str(output)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    seconds = time.perf_counter() - started
    # ru_maxrss of the children is that of the largest one, in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    lineage = json.loads((output / "compression.json").read_text())
    print(f"\n{'step':<12}{'peak resident MB':>18}{'seconds':>10}")
    for step in lineage["steps"]:
        print(f"{step['method']:<12}{step['peak_memory_bytes'] / 1e6:>18,.0f}{step['seconds']:>10,.0f}")
    print(f"{'whole run':<12}{peak / 1e6:>18,.0f}{seconds:>10,.0f}")
    print(f"\npeak resident memory / bytes of weights = {peak / size:.2f}")
    print(f"weights before / after = {size / lineage['result']['bytes']:.2f}")
    shutil.rmtree(arguments.folder)
    if arguments.limit_mb and peak / 1e6 > arguments.limit_mb:
        sys.exit(f"The peak is above {arguments.limit_mb:,.0f} MB.")


if __name__ == "__main__":
    main()
