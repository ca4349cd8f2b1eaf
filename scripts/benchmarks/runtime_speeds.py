#!/usr/bin/env python
"""How fast the runtimes are with what `compress-model export` writes: the demo model in each of them.

All rows are timed in one run of `compress.evaluation.bench`: each in a process of its own, taking turns. The
first one is the dense model in transformers, which the others are compared with. Runtimes that are not
installed are left out, and a line says so. mlx-lm is not among them: it is for the GPUs of Apple machines,
and a prefill on an ordinary CPU takes it minutes.

    python scripts/benchmarks/runtime_speeds.py [--threads 2] [--llama-cpp FOLDER]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from common import Sheet, command, compressed, dense_model, parser
from decode import figures, timed
from elsewhere import RUNTIMES, Elsewhere

from compress.evaluation.bench import Contestant
from compress.evaluation.timed import Settings

ROUNDED = {"method": "rtn", "bits": 4, "group_size": 64, "embedding_bits": 8}
PACKAGES = {"onnx": "onnxruntime", "bitsandbytes": "bitsandbytes", "gguf": "llama_cpp"}


def contestants(folder: Path, threads: int, llama_cpp: Path | None) -> Iterator[Contestant]:
    """The rows; those whose runtime is missing are left out."""
    dense = dense_model(folder)
    rounded, nf4 = folder / "4-bits", folder / "nf4"
    compressed(rounded, dense, [ROUNDED])
    compressed(nf4, dense, [{"method": "nf4"}])
    settings = Settings(threads=threads)
    yield Elsewhere("dense, as huggingface", exported(dense, "huggingface"), settings)
    yield Contestant("4 bits, in compress-model", rounded, settings)
    for name, source, format in (
        ("4 bits, as compressed-tensors", rounded, "compressed-tensors"),
        ("NF4, as bitsandbytes", nf4, "bitsandbytes"),
        ("dense, as onnx", dense, "onnx"),
        ("4 bits, as gguf", rounded, "gguf"),
    ):
        if (package := PACKAGES.get(format)) and not find_spec(package):
            print(f"{package} is not here, so its row is left out.", file=sys.stderr)
            continue
        model = exported(source, format, ".gguf" if format == "gguf" else "")
        runtime = format if format in RUNTIMES else "transformers"
        yield Elsewhere(name, model, settings, runtime, llama_cpp)


def exported(source: Path, format: str, suffix: str = "") -> Path:
    """The export of a folder, made once beside it."""
    output = source.with_name(f"{source.name}.{format}{suffix}")
    if not output.exists():
        command("export", source, "--format", format, "-o", output)
    return output


def main() -> None:
    options = parser(__doc__, "runtime_speeds")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--prefill-tokens", type=int, default=512)
    options.add_argument("--decode-tokens", type=int, default=64)
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where pip --target put it")
    arguments = options.parse_args()
    if arguments.llama_cpp:
        sys.path.append(str(arguments.llama_cpp))
    sheet = Sheet(arguments, "runtime_speeds")
    rows = list(contestants(sheet.folder, arguments.threads, arguments.llama_cpp))
    found = timed("speeds", rows, sheet.folder, arguments)
    for row, contestant in zip(found.models, rows, strict=True):
        measured = {"figures": figures(row, contestant.folder), "facts": {"kernel": row.kernel}}
        sheet.row(row.name, lambda measured=measured: measured)
    sheet.show()


if __name__ == "__main__":
    main()
