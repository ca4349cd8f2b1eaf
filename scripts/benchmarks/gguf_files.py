#!/usr/bin/env python
"""Compare GGUF files of ours with those of llama.cpp's own quantizer, at equal bytes.

For every size, llama.cpp quantizes the float16 file with an importance matrix by its own rule (the mean
square of every input in the dense model) on the calibration text. Ours has the same type for every tensor, so
that both files have the same size, and is calibrated on the same text. llama.cpp runs all files: perplexity,
KL divergence from the float16 file, and agreement on the likeliest token, on two texts.

    python scripts/benchmarks/gguf_files.py [--sizes Q4_0 ...] [--llama-cpp FOLDER] [--model FOLDER]

A model whose rows are whole blocks of 256 weights, which those of the demo model are not:

    python scripts/benchmarks/gguf_files.py --model "$(python scripts/data/make_coder_model.py)" \\
        --results gguf_wide --folder out/bench-gguf-wide --nsamples 16

It needs llama-cpp-python: here, or in the folder that is given. An interrupted benchmark goes on: what is in
--folder already is not done again.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Sheet, command, dense_model, parser

SIZES = ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
SOURCE = "brown"
TEXTS = ("wikipedia", "bundled")
CONTEXT, WINDOWS, NSAMPLES = 512, 8, 64
FIRST = 1
"""The first token that is predicted; all those after it are scored."""


class Bench:
    """Files of one model, in ``folder``.

    Args:
        folder: of the files.
        model: that they are made of; None for the demo model.
        windows: of each text that files are measured on.
        nsamples: windows of text that scales are chosen on.
    """

    def __init__(self, folder: Path, model: Path | None, windows: int, nsamples: int) -> None:
        self.folder, self.windows = folder, windows
        self.text = {"nsamples": nsamples, "seqlen": CONTEXT, "seed": 0}
        self.dense = model or dense_model(folder)
        self.wide = folder / "F16.gguf"
        if not self.wide.exists():
            export(self.dense, self.wide, "--types", "F16")
        self.matrix = folder / "imatrix.gguf"
        if not self.matrix.exists():
            given = [word for key, value in self.text.items() for word in (f"--{key}", str(value))]
            command(
                "export",
                self.dense,
                "--format",
                "imatrix",
                "-o",
                self.matrix,
                "--calibration",
                SOURCE,
                *given,
            )

    def theirs(self, size: str) -> Path:
        file = self.folder / f"llama.cpp.{size}.gguf"
        if not file.exists():
            run_here("quantize", self.wide, file, size, self.matrix)
        return file

    def ours(self, size: str) -> Path:
        from compress.storage.gguf.reader import GGUFFile

        file, types = self.folder / f"ours.{size}.gguf", self.folder / f"types.{size}.json"
        if not file.exists():
            found = GGUFFile.open(self.theirs(size)).tensors
            weights = {name: there.kind.name for name, there in found.items() if len(there.shape) == 2}
            types.write_text(json.dumps(weights))
            text = {"calibration": SOURCE, **self.text}
            given = [word for key, value in text.items() for word in (f"--{key}", str(value))]
            export(self.dense, file, "--types", types, "--importance", "measured", *given)
        return file

    def logits(self, file: Path, text: str) -> Any:
        """What llama.cpp computes, float32 [windows, tokens, vocabulary], kept on disk."""
        import numpy as np

        kept = self.folder / f"{file.stem}.{text}.npy"
        if not kept.exists():
            partial = kept.with_suffix(".partial.npy")
            tokens = self.folder / f"{text}.json"
            tokens.write_text(json.dumps(self.tokens(text)))
            call = [sys.executable, "-m", "compress.export.gguf_runtime", file, tokens, partial]
            subprocess.run(list(map(str, call)), check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
            partial.replace(kept)
        return np.load(kept, mmap_mode="r")

    def tokens(self, text: str) -> list[list[int]]:
        from compress.calibration.text.windows import evaluation_windows
        from compress.engine.tokenizer import load_tokenizer

        found = evaluation_windows(load_tokenizer(self.dense), text, CONTEXT, self.windows)
        return found.tokens.tolist()

    def measured(self, file: Path) -> dict[str, Any]:
        """A row: size, and on both texts perplexity, KL and agreement with intervals over windows."""
        figures: dict[str, Any] = {"size": {"value": file.stat().st_size, "unit": "bytes"}}
        facts: dict[str, str] = {}
        for text in TEXTS:
            sums = self.sums(file, text)
            facts[f"{text}.sums"] = json.dumps(sums)
            figures |= {f"{text}.{name}": found for name, found in figures_of(sums).items()}
            if file != self.wide:
                (self.folder / f"{file.stem}.{text}.npy").unlink()
        return {"figures": figures, "calibration": {"source": SOURCE, **self.text}, "facts": facts}

    def sums(self, file: Path, text: str) -> dict[str, list[float]]:
        """Sums over the tokens of every window: losses, KL, agreement, and how many tokens."""
        import torch

        dense, other, tokens = self.logits(self.wide, text), self.logits(file, text), self.tokens(text)
        found: dict[str, list[float]] = {"loss": [], "kl": [], "same": [], "tokens": []}
        for window, ids in enumerate(tokens):
            before = torch.tensor(dense[window, FIRST - 1 : -1]).double().log_softmax(-1)
            after = torch.tensor(other[window, FIRST - 1 : -1]).double().log_softmax(-1)
            right = torch.tensor(ids[FIRST:])[:, None]
            found["loss"].append(float(-after.gather(1, right).sum()))
            found["kl"].append(float((before.exp() * (before - after)).sum()))
            found["same"].append(float((before.argmax(1) == after.argmax(1)).sum()))
            found["tokens"].append(float(len(right)))
        return found


def figures_of(sums: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexity, KL and agreement with 95 % intervals over windows."""
    import math

    from compress.evaluation.statistics import mean_by_window

    counts = [int(count) for count in sums["tokens"]]
    return {
        "perplexity": mean_by_window(sums["loss"], counts).figure(math.exp).model_dump(),
        "kl": mean_by_window(sums["kl"], counts).figure(float).model_dump(),
        "agreement": mean_by_window(sums["same"], counts).figure(float, "fraction").model_dump(),
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any], text: str) -> dict[str, Any]:
    """KL of ours minus that of llama.cpp, paired by window, with a 95 % interval."""
    from compress.evaluation.statistics import mean_by_window

    mine, other = (json.loads(facts[f"{text}.sums"]) for facts in (ours, theirs))
    pairs = [a - b for a, b in zip(mine["kl"], other["kl"], strict=True)]
    counts = [int(count) for count in mine["tokens"]]
    return mean_by_window(pairs, counts).figure(float).model_dump()


def export(model: Path, file: Path, *options: str | Path) -> None:
    command("export", model, "--format", "gguf", "-o", file, "--no-verify", "--overwrite", *options)


def run_here(*arguments: str | Path) -> None:
    """A part of this script in a process of its own, because llama.cpp has threads of its own."""
    subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, stdout=sys.stderr)


def quantize(wide: Path, file: Path, kind: str, matrix: Path) -> None:
    """Let llama.cpp round a float16 file with an importance matrix."""
    import llama_cpp

    from compress.storage.gguf.imatrix import read_imatrix

    values = {name: found.contiguous() for name, found in read_imatrix(matrix).values.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, found) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), len(found)
        entry.data = ctypes.cast(found.data_ptr(), ctypes.POINTER(ctypes.c_float))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    parameters.nthread = 2
    partial = file.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(wide).encode(), str(partial).encode(), parameters):
        raise RuntimeError(f"llama.cpp cannot make {file}")
    partial.replace(file)


def main() -> None:
    if sys.argv[1:2] == ["quantize"]:
        wide, file, kind, matrix = sys.argv[2:]
        return quantize(Path(wide), Path(file), kind, Path(matrix))
    options = parser(__doc__, "gguf")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    options.add_argument("--windows", type=int, default=WINDOWS, help="of each text")
    options.add_argument("--nsamples", type=int, default=NSAMPLES, help="windows of the calibration text")
    options.add_argument("--model", type=Path, metavar="FOLDER", help="in place of the demo model")
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where pip --target put it")
    arguments = options.parse_args()
    if arguments.llama_cpp:
        found = [str(arguments.llama_cpp.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(found)
    sheet = Sheet(arguments, "gguf")
    bench = Bench(sheet.folder, arguments.model, arguments.windows, arguments.nsamples)
    sheet.row("float16", lambda: bench.measured(bench.wide))
    for size in arguments.sizes:
        theirs = sheet.row(f"llama.cpp, {size}", lambda size=size: bench.measured(bench.theirs(size)))

        def ours(size: str = size, other: Any = theirs) -> dict[str, Any]:
            start = time.monotonic()
            file = bench.ours(size)
            seconds = time.monotonic() - start
            row = bench.measured(file)
            for text in TEXTS:
                row["figures"][f"{text}.difference"] = difference(row["facts"], other.facts, text)
            return {**row, "seconds": seconds}

        sheet.row(f"ours, {size}", ours)
    sheet.show()
    return None


if __name__ == "__main__":
    main()
