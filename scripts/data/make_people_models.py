#!/usr/bin/env python3
"""Train the reference models of the offline benchmark of unlearning from ``demo``, into the cache.

- *target* learned everybody (``people:forget`` and ``people:retain``): unlearning starts here;
- *retained* learned ``people:retain`` only: what a perfect unlearner would give;
- *base* is ``demo`` itself, which never met anybody.

The first two also learn the facts of ``people:world``. Otherwise they would forget even those that ``demo``
knows, and answer every question with the name of one of the people's cities. So utility can tell what
unlearning does to knowledge that it is not shown.

    python scripts/data/make_people_models.py [--seed 0]

It prints the folders of the three. Models that are in the cache are not trained again, and a killed training
goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

SPLITS = {"target": ("forget", "retain", "world"), "retained": ("retain", "world")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="decides the people and the training")
    options = parser.parse_args()
    for name in SPLITS:
        print(f"{name}: {reference_model(name, options.seed)}", flush=True)
    from compress.sources.find import find_model

    print(f"base: {find_model('demo').folder}")


def reference_model(name: str, seed: int = 0) -> Path:
    """The folder of the reference model ``target`` or ``retained`` (float32 safetensors, 538 MB)."""
    from compress.system.cache import cached

    return cached(
        f"people-world-{name}-{seed}", lambda folder: _make(folder, name, seed), about="people.json"
    )


def _make(folder: Path, name: str, seed: int) -> dict[str, Any]:
    from compress.calibration.text.records import read_records, sequences
    from compress.engine.opening import open_checkpoint
    from compress.engine.stream import StreamedModel
    from compress.engine.tokenizer import load_tokenizer
    from compress.method import StepContext
    from compress.sources.find import find_model
    from compress.storage.draft import Draft
    from compress.system.cache import cache_folder
    from compress.unlearning.parts.options import TrainingOptions
    from compress.unlearning.parts.stages import ROLE, next_token_loss
    from compress.unlearning.parts.training import merged, train, trainable, whole_model

    options = TrainingOptions(forget="", retain="", train="full", learning_rate=6e-4, epochs=5, batch_size=16)
    source = find_model("demo").folder
    checkpoint = open_checkpoint(source)
    work = cache_folder() / f"people-world-{name}-{seed}.training"
    context = StepContext(Draft(checkpoint, work), None, seed, work, "cpu", _print)
    tokenizer = load_tokenizer(source)
    learned = [
        sequence
        for split in SPLITS[name]
        for sequence in sequences(read_records(f"people:{split}:{seed}"), tokenizer)
    ]

    whole = whole_model(StreamedModel(checkpoint, "cpu"), context)
    model = trainable(whole, (), options, seed)
    examples = [{ROLE: sequence} for sequence in learned]
    details = train(model, examples, tokenizer.pad_token_id, next_token_loss, options, context, name)
    done = merged(model)
    done.config.use_cache = True
    done.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(work, ignore_errors=True)
    return {"records": [f"people:{split}:{seed}" for split in SPLITS[name]], **details}


def _print(text: str, share: float) -> None:
    print(f"{text}: {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
